"""The frameworks' own trainers around one small model, and the plain loop that they must agree with."""

import pytest
import torch
from oracle import assert_same_bits
from test_training import batches, loss_of, net
from torch import nn

from inmerge_fast import InMerge, NoiseThreshold, RankBudget

RECIPE = {"threshold": NoiseThreshold(0.5), "prob": 0.5, "skip_first": 1, "start": 2, "seed": 4}
BUDGET = {"threshold": RankBudget(0.3), "prob": 0.5, "skip_first": 1}
ALWAYS = {"threshold": -1.0, "prob": 1.0, "skip_first": 0, "guard": None}
STEPS, ACCUMULATE = 6, 2
DATA = batches(STEPS * ACCUMULATE)


class Batches(torch.utils.data.Dataset):
    """The data; item number ``fails_at``, counted over all epochs, raises ``error``."""

    def __init__(self, fails_at=None, error=None):
        self.taken, self.fails_at, self.error = 0, fails_at, error

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        self.taken += 1
        if self.taken == self.fails_at:
            raise self.error
        return {"x": DATA[index]}


def plain_loop(recipe=RECIPE, epochs=1):
    """The model after a plain loop with gradient accumulation, and its InMerge."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    merger = InMerge(model, **recipe)
    for _ in range(epochs):
        for index, x in enumerate(DATA):
            (loss_of(model, x) / ACCUMULATE).backward()
            if index % ACCUMULATE == ACCUMULATE - 1:
                optimizer.step()
                merger.step()
                optimizer.zero_grad()
    return model, merger


def forward_loop(recipe, epochs=1):
    """The same with merging for the forward and backward passes only, by hooks of the optimizer."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    merger = InMerge(model, **recipe).attach(optimizer)
    for _ in range(epochs):
        for index, x in enumerate(DATA):
            (loss_of(model, x) / ACCUMULATE).backward()
            if index % ACCUMULATE == ACCUMULATE - 1:
                optimizer.step()
                optimizer.zero_grad()
    merger.detach()
    return model, merger


def assert_same_weights(model, other):
    for name, value in other.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


def assert_as_plain(model, merger, plain):
    assert merger.step_count == plain[1].step_count > 0
    assert_same_weights(model, plain[0])


def hooks_of(optimizer):
    return len(optimizer._optimizer_step_post_hooks)


def lightning_parts():
    """A LightningModule's class, and a function that fits one: ``fit(module, callbacks, folder, **trainer)``."""
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

    def fit(module, callbacks, folder, **arguments):
        resume, data = arguments.pop("ckpt_path", None), arguments.pop("data", None) or Batches()
        validation = arguments.pop("val", None)
        arguments = {
            "max_epochs": 1, "accumulate_grad_batches": ACCUMULATE, "accelerator": "cpu", "devices": 1, "logger": False,
            "default_root_dir": folder, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False,
        } | arguments  # fmt: skip
        trainer = lightning.Trainer(callbacks=callbacks, **arguments)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), validation, ckpt_path=resume)
        return trainer

    return Module, fit


class Classifier(nn.Module):
    """As Hugging Face's Trainer wants a model: a dict with the loss. More than ``largest`` rows do not fit."""

    largest = 99

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = net()

    def forward(self, x):
        if len(x) > self.largest:
            raise RuntimeError("CUDA out of memory.")
        return {"loss": loss_of(self.net, x)}


def huggingface_trainer(model, callbacks, folder, **arguments):
    """A Trainer that takes the data in order, with the plain loop's optimizer; of ``model``, or what makes one."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = arguments.pop("data", None) or Batches()
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 1, "gradient_accumulation_steps": ACCUMULATE,
        "num_train_epochs": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "max_grad_norm": 0.0,
        "disable_tqdm": True, "seed": 0, "remove_unused_columns": False, "logging_strategy": "no",
        "dataloader_pin_memory": False, "label_names": ["x"],
    } | arguments  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_optimizer(self, *_):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
            self._created_lr_scheduler = True
            return self.lr_scheduler

    return InOrder(
        **({"model": model} if isinstance(model, nn.Module) else {"model_init": model}),
        args=transformers.TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=Batches(),
        data_collator=lambda items: {"x": torch.cat([item["x"] for item in items])},
        callbacks=callbacks,
    )
