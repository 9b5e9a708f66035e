"""Layers whose weight is computed at every forward pass: a merge of it would be lost, so it raises."""

import warnings

import pytest
from oracle import untouched
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import inmerge_fast
from inmerge_fast import MergePlan

SAMPLE_ALL = {"prob": 1.0, "threshold": -1.0, "seed": 1, "step": 0}


def _quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def weight_normed():
    return _quiet(lambda: nn.utils.weight_norm(nn.Conv2d(2, 4, 3)))


def old_spectral_normed():
    return _quiet(lambda: nn.utils.spectral_norm(nn.Conv2d(2, 4, 3)))


class Halve(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), "the parametrization _WeightNorm"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), "the parametrization _SpectralNorm"),
        (lambda: parametrizations.orthogonal(nn.Conv2d(2, 4, 3)), "the parametrization _Orthogonal"),
        (lambda: _parametrized(), "the parametrization Halve"),
        (weight_normed, "by WeightNorm"),
        (old_spectral_normed, "by SpectralNorm"),
        (lambda: prune.l1_unstructured(nn.Conv2d(2, 4, 3), "weight", 0.5), "by L1Unstructured"),
    ],
)
def test_parametrised_layers(make, named):
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), make(), nn.BatchNorm2d(4))
    check = untouched(model)
    for target in (model, model[2], [model[0], model[2]]):
        with pytest.raises(ValueError, match=f"weight is computed at every forward pass.*{named}.*leave the layer out"):
            inmerge_fast.merge_(target, **SAMPLE_ALL)
    check()
    assert inmerge_fast.merge_(model, exclude=["2"], skip_first=0, **SAMPLE_ALL).merged == 4


def _parametrized():
    conv = nn.Conv2d(2, 4, 3)
    parametrize.register_parametrization(conv, "weight", Halve())
    return conv


def test_a_parametrisation_that_is_registered_later_is_noticed_and_removing_it_heals():
    conv = nn.Conv2d(2, 4, 3)
    inmerge_fast.merge_(conv, **SAMPLE_ALL)
    prune.l1_unstructured(conv, "weight", 0.5)
    with pytest.raises(ValueError, match="computed at every forward pass"):
        inmerge_fast.merge_(conv, **SAMPLE_ALL)
    prune.remove(conv, "weight")
    assert inmerge_fast.merge_(conv, **SAMPLE_ALL).merged == 4


def test_modules_without_a_weight():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = None
    check = untouched(model)
    with pytest.raises(TypeError, match="^1: expected a weight tensor, got NoneType"):
        inmerge_fast.merge_(model, skip_first=0, **SAMPLE_ALL)
    with pytest.raises(TypeError, match="expected a weight tensor, got NoneType"):
        inmerge_fast.merge_(model[1], **SAMPLE_ALL)
    check()


def test_layers_without_a_parameter_of_their_own_are_not_taken_for_tied():
    model = nn.Sequential(_parametrized(), _parametrized(), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="^1: the weight is computed at every forward pass"):
        inmerge_fast.merge_(model, skip_first=0, exclude="0", **SAMPLE_ALL)
    plan = MergePlan(model, skip_first=0, exclude=["0", "1"])
    assert [layer.layer_id for layer in plan.layers] == [2]
    with pytest.raises(ValueError, match="0: .*computed at every forward pass"):
        inmerge_fast.merge_(list(model), **SAMPLE_ALL)


def test_a_weight_property_of_the_class_hides_the_parameter():
    class Scaled(nn.Conv2d):
        @property
        def weight(self):
            return self._parameters["weight"] * 2

    conv = nn.Conv2d(2, 4, 3)
    conv.__class__ = Scaled
    with pytest.raises(ValueError, match="computed at every forward pass"):
        inmerge_fast.merge_(conv, **SAMPLE_ALL)


def test_a_weight_that_is_a_buffer_is_called_one():
    conv = nn.Conv2d(2, 4, 3)
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.register_buffer("weight", weight)
    model = nn.Sequential(conv, nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"^0: the weight is a buffer.*merge_\(module\.weight\).*exclude="):
        inmerge_fast.merge_(model, skip_first=0, **SAMPLE_ALL)
    assert inmerge_fast.merge_(conv.weight, **SAMPLE_ALL).sampled == 4
    assert inmerge_fast.merge_(model, skip_first=0, exclude="0", **SAMPLE_ALL).sampled == 4
