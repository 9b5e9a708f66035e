"""The callbacks in the real libraries: the same recipe gives the same weights as the plain loop."""

import os

import pytest
import torch
from oracle import assert_same_bits
from test_training import batches, loss_of, net
from torch import nn

from inmerge_fast import DictLogger, InMerge, NoiseThreshold, RankBudget

RECIPE = {"threshold": NoiseThreshold(0.5), "prob": 0.5, "skip_first": 1, "start": 2, "seed": 4}
STEPS, ACCUMULATE = 6, 2
DATA = batches(STEPS * ACCUMULATE)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture
def plain():
    """The model after a plain loop, and its InMerge."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    merger = InMerge(model, **RECIPE)
    for index, x in enumerate(DATA):
        (loss_of(model, x) / ACCUMULATE).backward()
        if index % ACCUMULATE == ACCUMULATE - 1:
            optimizer.step()
            merger.step()
            optimizer.zero_grad()
    return model, merger


def assert_as_plain(model, merger, plain):
    assert merger.step_count == plain[1].step_count == STEPS
    for name, value in plain[0].state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return {"x": DATA[index]}


def lightning_parts():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = net()

        def training_step(self, batch, _):
            return loss_of(self.net, batch["x"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def fit(module, callback, folder, **arguments):
        resume = arguments.pop("ckpt_path", None)
        trainer = lightning.Trainer(
            max_epochs=arguments.pop("max_epochs", 1), accumulate_grad_batches=ACCUMULATE, callbacks=[callback],
            accelerator="cpu", devices=1, default_root_dir=folder, logger=arguments.pop("logger", False),
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **arguments,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None), ckpt_path=resume)
        return trainer

    return Module, fit


def test_lightning_gives_the_same_weights(plain, tmp_path):
    module_class, fit = lightning_parts()
    from lightning.pytorch.loggers import CSVLogger

    from inmerge_fast.integrations.lightning import InMergeCallback

    module, log = module_class(), DictLogger()
    callback = InMergeCallback(observe_every=2, loggers=[log], **RECIPE)
    fit(module, callback, tmp_path, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    assert_as_plain(module.net, callback.merger, plain)
    assert callback.merger.plan.names == ["net.3", "net.5"]
    assert [row["step"] for row in log.rows] == [2, 4]
    [metrics] = tmp_path.rglob("metrics.csv")
    assert "inmerge/net.3/mean_similarity" in metrics.read_text()


def test_lightning_resumes_bit_identically(tmp_path):
    """Two epochs in one go, and with the state through a checkpoint between them."""
    module_class, fit = lightning_parts()
    from inmerge_fast.integrations.lightning import InMergeCallback

    with pytest.raises(ValueError, match=r"optimizer=3, but the module has 1 optimizers"):
        fit(module_class(), InMergeCallback(optimizer=3, **RECIPE), tmp_path)
    whole, in_one_go = module_class(), InMergeCallback(**RECIPE)
    fit(whole, in_one_go, tmp_path, max_epochs=2)
    trainer = fit(module_class(), InMergeCallback(**RECIPE), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module, callback = module_class(), InMergeCallback(**RECIPE)
    fit(module, callback, tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert callback.merger.state_dict() == in_one_go.merger.state_dict()
    assert callback.merger.step_count == 2 * STEPS
    for name, value in whole.state_dict().items():
        assert_same_bits(module.state_dict()[name], value, name)


BUDGET = {"threshold": RankBudget(0.3), "prob": 0.5, "skip_first": 1}


@pytest.mark.filterwarnings("default::UserWarning")
def test_lightning_tells_a_budget_its_steps_and_knows_its_epochs(tmp_path):
    module_class, fit = lightning_parts()
    from inmerge_fast.integrations.lightning import InMergeCallback

    callback = InMergeCallback(**BUDGET, start=2)
    fit(module_class(), callback, tmp_path, max_epochs=2)
    assert callback.merger._run.recipe.merging_steps == 2 * STEPS - 2
    with pytest.warns(UserWarning, match=r"steps_per_epoch=12, but this trainer makes 6 optimizer steps per epoch"):
        fit(module_class(), InMergeCallback(steps_per_epoch=len(DATA), stop=2), tmp_path, max_epochs=2)
    with pytest.raises(ValueError, match=r"has to know how many they are: pass stop="):
        fit(module_class(), InMergeCallback(**BUDGET, start=50), tmp_path)


class Classifier(nn.Module):
    """As Hugging Face's Trainer wants a model: a dict with the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = net()

    def forward(self, x):
        return {"loss": loss_of(self.net, x)}


def huggingface_trainer(model, callback, folder, **arguments):
    transformers = pytest.importorskip("transformers")
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "gradient_accumulation_steps": ACCUMULATE,
        "num_train_epochs": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "max_grad_norm": 0.0,
        "disable_tqdm": True, "seed": 0, "remove_unused_columns": False, "logging_strategy": "no",
        "dataloader_pin_memory": False,
    } | arguments  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=Batches(),
        data_collator=lambda items: items[0],
        callbacks=[callback],
        optimizers=(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), lambda _: 1.0),
        ),
    )


def test_huggingface_gives_the_same_weights_and_resumes(plain, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from inmerge_fast.integrations.huggingface import InMergeCallback

    model, callback = Classifier(), InMergeCallback(**RECIPE)
    huggingface_trainer(model, callback, tmp_path, save_strategy="steps", save_steps=3).train()
    assert_as_plain(model.net, callback.merger, plain)
    checkpoint = tmp_path / "checkpoint-3"
    resumed, callback = Classifier(), InMergeCallback(**RECIPE)
    trainer = huggingface_trainer(resumed, callback, tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_as_plain(resumed.net, callback.merger, plain)
    os.remove(checkpoint / "inmerge.pt")
    trainer = huggingface_trainer(Classifier(), InMergeCallback(**RECIPE), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"resumes at step 3, but there is no .*inmerge.pt"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.filterwarnings("default::UserWarning")
def test_huggingface_tells_a_budget_its_steps_and_knows_its_epochs(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from inmerge_fast.integrations.huggingface import InMergeCallback

    callback = InMergeCallback(**BUDGET, start=2)
    huggingface_trainer(Classifier(), callback, tmp_path, num_train_epochs=3).train()
    assert callback.merger._run.recipe.merging_steps == 3 * STEPS - 2
    with pytest.warns(UserWarning, match=r"steps_per_epoch=12, but this trainer makes 6 optimizer steps per epoch"):
        huggingface_trainer(Classifier(), InMergeCallback(steps_per_epoch=len(DATA), stop=2), tmp_path).train()


def test_timm_gives_the_same_weights_as_a_plain_loop():
    """Model, optimizer, loss scaler and EMA as in timm's train.py; one line is added."""
    reason = "timm needs torchvision, whose wheels each demand one build of PyTorch; installed by hand this runs"
    timm = pytest.importorskip("timm", reason=reason)
    pytest.importorskip("timm.optim")
    pytest.importorskip("timm.utils")

    recipe = {"threshold": NoiseThreshold(1.0), "prob": 0.5}
    data = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(timm.create_model("resnet10t", num_classes=4))
    model, twin = models
    optimizer = timm.optim.create_optimizer_v2(model, opt="momentum", lr=0.05, momentum=0.9)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    merger = InMerge(model, **recipe).attach(optimizer)
    scaler = timm.utils.NativeScaler("cpu")
    for step, x in enumerate(data):
        scaler(loss_of(model, x), optimizer, parameters=model.parameters())
        ema.update(model, step=step)
        optimizer.zero_grad()
    plain_optimizer = timm.optim.create_optimizer_v2(twin, opt="momentum", lr=0.05, momentum=0.9)
    plain, merged = InMerge(twin, **recipe), 0
    for x in data:
        loss_of(twin, x).backward()
        plain_optimizer.step()
        merged += plain.step().merged
        plain_optimizer.zero_grad()
    assert merged > 0
    assert merger.step_count == 3
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)  # the scaler multiplies and divides by a power of two
