"""Heads: convolutions whose outputs no layer reads, one filter per class or anchor, are left out unless asked for."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torchvision_ops
from oracle import untouched
from torch import nn

from benchmarks.nets import resnet18, unet
from inmerge_fast import InMerge, MergePlan, merge_, merged, similarity
from inmerge_fast.plan.candidates import module_candidates

HEAD = "a head: no layer reads its outputs (include_heads=True merges it)"
MERGE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}
torchvision_ops.declare()


def segmenter(classes=5):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, classes, 1))


def heads(net):
    return MergePlan(net, skip_first=0).heads


def among(net):
    """The heads of a network whose weights may have no values."""
    return [candidate.name for candidate in module_candidates(net, False)[0] if candidate.is_head]


def test_a_head_is_left_out_with_the_reason_and_takes_part_when_asked():
    net = segmenter()
    plan = MergePlan(net, skip_first=0)
    assert plan.names == ["0", "2"]
    assert plan.heads == ("4",)
    assert plan.skipped == (("4", HEAD),)
    assert f"skipped 1, {HEAD}: 4" in str(plan)
    check = untouched(net[4])
    assert merge_(net, skip_first=0, **MERGE_ALL).merged == 16
    check()
    assert merge_(net, skip_first=0, include_heads=True, **MERGE_ALL).merged == 21
    with pytest.raises(AssertionError):
        check()


def test_every_entrance_has_the_switch():
    net = segmenter()
    for extra, names in (({}, ["0", "2"]), ({"include_heads": True}, ["0", "2", "4"])):
        with merged(net, seed=0, step=0, **extra) as stats:
            assert [layer.name for layer in stats.layers] == names
        for lasting in (True, False):
            merger = InMerge(net, skip_first=0, lasting=lasting, **extra)
            assert merger.plan.names == names
            assert copy.deepcopy(merger).plan.names == names
        assert [row.name for row in InMerge(net, skip_first=0, **extra).preview().layers] == names
    with pytest.raises(TypeError, match="include_heads must be a bool, got 1"):
        merge_(net, include_heads=1, **MERGE_ALL)
    with pytest.raises(TypeError, match="include_heads must be a bool, got 'yes'"):
        InMerge(net, include_heads="yes")
    with pytest.raises(ValueError, match="include_heads and layer are set where a MergePlan is built"):
        merge_(MergePlan(net), include_heads=True, **MERGE_ALL)
    assert len(similarity(net).layers) == 3  # a look shows all


def test_heads_keep_their_number_in_the_draw_and_their_place_in_skip_first():
    net, apart = segmenter(), segmenter()
    apart.load_state_dict(net.state_dict())
    tail = nn.Sequential(*net, nn.Conv2d(5, 8, 3), nn.BatchNorm2d(8))  # with which it is none
    assert [layer.layer_id for layer in MergePlan(tail, skip_first=0).layers] == [0, 1, 2, 3]
    assert [layer.layer_id for layer in MergePlan(net, skip_first=0).layers] == [0, 1]
    assert MergePlan(net, skip_first=0.3).names == ["2"]
    assert MergePlan(net, skip_first=0.6).names == ["2"]  # a share never leaves out all, and heads are no others
    with pytest.raises(ValueError, match=r"skipped 2, among the first 2.*a head.*include_heads=True merges it"):
        MergePlan(net, skip_first=2)


def test_a_frozen_head_does_not_wait_to_be_trained():
    net = segmenter()
    net[4].requires_grad_(False)
    assert MergePlan(net).frozen == ()
    assert MergePlan(net, include_heads=True).frozen == ("4",)


def test_what_is_given_itself_is_meant():
    net = segmenter()
    assert merge_(net[4], **MERGE_ALL).merged == 5
    assert merge_([net[0], net[4]], **MERGE_ALL).merged == 13
    assert MergePlan(nn.Sequential(nn.Conv2d(3, 7, 3))).heads == ()  # of a single layer


def test_a_state_from_before_there_were_heads_goes_on_with_what_was_merged():
    """Then they were merged, so that a resumed run must merge them; where there are none, nothing needs saying."""
    for net, options in ((segmenter(), {"include_heads": True}), (resnet18(3), {})):
        state = InMerge(net, guard=None, **options).state_dict()
        del state["choice"]["include_heads"]
        InMerge(net, guard=None, **options).load_state_dict(state)
        for parameter in net[4].parameters() if options else net.layer4[0].parameters():
            parameter.requires_grad_(False)  # then the layers differ, and what chose them is compared
        InMerge(net, guard=None, **options).load_state_dict(state)
    net = segmenter()
    state = InMerge(net, skip_first=0, include_heads=True, guard=None).state_dict()
    del state["choice"]["include_heads"]
    with pytest.raises(ValueError, match=r"difference is \['4'\]; .*same .*include_heads"):
        InMerge(net, skip_first=0, guard=None).load_state_dict(state)


@pytest.mark.parametrize(
    ("ending", "found"),
    [
        ([nn.Conv2d(8, 5, 1)], ("4",)),
        ([nn.ConvTranspose2d(8, 5, 2)], ("4",)),
        ([nn.Conv2d(8, 5, 1, bias=False)], ("4",)),  # the last one
        ([nn.Conv2d(8, 255, 1)], ("4",)),  # anchors
        ([nn.Conv2d(8, 5, 1), nn.Softmax(1), nn.CrossEntropyLoss(weight=torch.ones(5))], ("4",)),
        ([nn.Conv2d(8, 1, 1)], ()),  # one filter, which has its own reason
        ([nn.Conv2d(8, 8, 1)], ()),  # a body that goes on in what holds it
        ([nn.Conv2d(8, 64, 1)], ()),  # the same, widened
        ([nn.Conv2d(8, 16, 1)], ()),
        ([nn.Conv2d(8, 6, 1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)], ()),  # mean and variance, and a decoder
        ([nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)], ()),
        ([nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5, affine=False, track_running_stats=False)], ()),
        ([nn.Conv2d(8, 5, 1), nn.PReLU(5)], ()),
        ([nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(5 * 12, 3)], ()),
        ([nn.Conv2d(8, 5, 1), nn.Flatten(), nn.LazyLinear(3)], ()),
        ([nn.Conv2d(8, 5, 1), nn.GRU(5 * 4, 3)], ()),
        ([nn.Conv2d(8, 36, 1), nn.PixelShuffle(2), nn.Conv2d(9, 3, 1)], ("6",)),
        ([nn.Conv2d(8, 24, 1), nn.Conv2d(8, 3, 1)], ("5",)),  # query, key and value, and their projection
        ([nn.Conv2d(8, 7, 1), nn.Conv2d(8 + 7, 16, 1), nn.BatchNorm2d(16)], ()),  # concatenated
    ],
)  # fmt: skip
def test_what_is_a_head(ending, found):
    body = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    assert heads(nn.Sequential(*body, *ending)) == found


class Attention(nn.Module):
    """As SAGAN and DANet have it: a product alone reads queries and keys."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width, width // 4, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(1))


def test_a_query_and_a_key_are_none():
    assert heads(nn.Sequential(nn.Conv2d(3, 32, 3), Attention(32), nn.Conv2d(32, 5, 1))) == ("2",)
    twins = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 1))
    assert heads(twins) == ("2", "3")  # two heads alike


@pytest.mark.parametrize("shape", [(100, 20, 1, 1), (1, 20, 7, 7), (20, 100)])
def test_what_a_parameter_beside_the_layers_may_read_is_none(shape):
    """As prototypes, position embeddings and classifiers without a Linear."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 20, 1))
    assert heads(net) == ("2",)
    net.own = nn.Parameter(torch.zeros(shape))
    assert heads(net) == ()


def test_layers_are_found_whatever_order_they_are_registered_in():
    class Odd(nn.Module):
        """A decoder whose upsampling stands after what reads it, and after the head."""

        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList([nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3)])
            self.join = nn.ModuleList([nn.Conv2d(64, 32, 3), nn.Conv2d(32, 16, 3)])
            self.head = nn.Conv2d(16, 3, 1)
            self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2), nn.ConvTranspose2d(32, 16, 2)])

    assert heads(Odd()) == ("head",)


def test_a_concatenation_as_wide_as_another_layer():
    """The last layer of a DenseNet writes 8 of the 32 channels that its last norm reads, and others write 32."""
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.DenseNet(2, 1, 3, init_features=16, growth_rate=8, block_config=(2, 2))
    assert net.features.norm5.num_features == net.features.denseblock2.denselayer2.layers.conv1.out_channels == 32
    assert heads(net) == ()


def test_an_autoencoder_and_a_tail_that_keeps_the_width_of_the_classes():
    wide = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 16, 3)]
    assert heads(nn.Sequential(*wide, nn.ConvTranspose2d(16, 3, 3))) == ("3",)
    tail = [nn.ConvTranspose2d(16, 3, 3), nn.InstanceNorm2d(3), nn.PReLU(), nn.Conv2d(3, 3, 3)]
    assert heads(nn.Sequential(*wide, *tail)) == ("6",)


def test_heads_of_torchvision():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        nets = {
            "fcn": models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True),
            "lraspp": models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
            "retinanet": models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None),
            "fcos": models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None),
            "ssd": models.detection.ssd300_vgg16(weights=None, weights_backbone=None),
            "mask": models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None),
        }
    found = {name: among(net) for name, net in nets.items()}
    ssd = [f"head.{kind}_head.module_list.{index}" for kind in ("classification", "regression") for index in range(6)]
    assert found == {
        "fcn": ["classifier.4", "aux_classifier.4"],
        "lraspp": ["classifier.low_classifier", "classifier.high_classifier"],
        "retinanet": ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
        "fcos": ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
        "ssd": ssd,
        "mask": ["rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits"],
    }


def found_without_values(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what libraries will change
        try:
            with torch.device("meta"):
                return among(build())
        except NotImplementedError:  # an initialisation that needs values
            return among(build())


def test_no_layer_of_a_classifiers_body_is_a_head(monkeypatch):
    """Every classifier of torchvision, whole and without what follows its features."""
    models = pytest.importorskip("torchvision").models
    widths = models.regnet.BlockParams.from_init_params

    def with_values(*args, **kwargs):
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    monkeypatch.setattr(models.regnet.BlockParams, "from_init_params", with_values)
    own = {"squeezenet1_0": ["classifier.1"], "squeezenet1_1": ["classifier.1"]}  # one filter per class
    names = models.list_models(models)
    assert len(names) > 70
    for name in names:
        assert found_without_values(partial(models.get_model, name, weights=None)) == own.get(name, []), name
    for name in ("alexnet", "vgg11", "vgg16_bn", "squeezenet1_1", "mobilenet_v2", "densenet121"):
        assert found_without_values(lambda name=name: models.get_model(name, weights=None).features) == [], name


def test_no_layer_of_a_body_of_timm_is_a_head():
    timm = pytest.importorskip("timm")
    bodies = [
        *(
            "nfnet_l0",
            "dm_nfnet_f0",
            "nf_regnet_b0",
            "ghostnet_100",
            "mobilenetv3_small_100",
            "skresnet18",
            "resnest14d",
        ),
        *("lambda_resnet26t", "focalnet_tiny_srf", "mobilevitv2_050", "efficientformerv2_s0", "levit_128s", "vgg11"),
        *(
            "hrnet_w18_small",
            "dpn68",
            "inception_v3",
            "coatnet_nano_rw_224",
            "botnet26t_256",
            "halonet26t",
            "selecsls42",
        ),
        *("eca_botnext26ts_256", "pvt_v2_b0", "poolformer_s12", "convit_tiny"),
    ]
    ends = ({}, {"num_classes": 0})
    heads_of_their_own = {"dpn68": ["classifier"]}  # one filter per class
    for name in bodies:
        for end in ends:
            found = found_without_values(partial(timm.create_model, name, **end))
            assert found == ([] if end else heads_of_their_own.get(name, [])), (name, end)


def test_heads_of_monai():
    nets = pytest.importorskip("monai.networks.nets")
    up = {"channels": (16, 32, 64), "strides": (2, 2)}
    kernels = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    assert heads(nets.UNet(2, 1, 2, **up)) == ("model.2.conv",)
    assert heads(nets.UNet(2, 1, 14, **up, num_res_units=2)) == ("model.2.1.conv.unit0.conv",)
    assert heads(nets.SegResNet(2, 8, 4, 3)) == ("conv_final.2.conv",)
    assert heads(nets.DynUNet(2, 1, 3, **kernels, deep_supervision=True)) == (
        "output_block.conv.conv", "deep_supervision_heads.0.conv.conv",
    )  # fmt: skip
    assert heads(nets.DenseNet121(2, 1, 2)) == heads(nets.resnet18(n_input_channels=1, spatial_dims=2)) == ()
    assert heads(unet()) == ("head",)


@pytest.mark.parametrize("classes", [2, 105])
@pytest.mark.parametrize("deep", [True, False])
def test_heads_of_nnunet(classes, deep):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    net = unets.PlainConvUNet(
        1, 3, [32, 64, 128], nn.Conv2d, 3, [1, 2, 2], 2, classes, 2, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=deep,
    )  # fmt: skip
    assert heads(net) == ("decoder.seg_layers.0", "decoder.seg_layers.1")
