"""A ResNet-18 on a medical .npz with Hugging Face's Trainer, where merging is a callback.

    python examples/huggingface_resnet18.py                          # digits, no download
    python examples/huggingface_resnet18.py --data pneumoniamnist.npz --forward-only
    python examples/huggingface_resnet18.py --resume                 # to the bit as if it had never stopped

The callback follows the Trainer's optimizer steps and keeps its state in ``trainer_state.json``.
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, load
from torch.utils.data import Dataset, TensorDataset
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import inmerge_fast
from inmerge_fast.integrations.huggingface import InMergeCallback


class ByName(Dataset):
    """What the Trainer's collator and the model expect of an image and its label."""

    def __init__(self, pairs: TensorDataset) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, y = self._pairs[index]
        return {"pixel_values": x, "labels": y}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images that are judged right."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main(given: list[str] | None = None) -> torch.nn.Module:
    """Train, and return the network."""
    options = arguments(__doc__, given)
    set_seed(0)
    train_set, val_set, classes = load(options)
    widths = [options.width << stage for stage in range(4)]
    config = ResNetConfig(
        num_channels=train_set[0][0].shape[0], embedding_size=widths[0], hidden_sizes=widths, depths=[2, 2, 2, 2],
        layer_type="basic", num_labels=classes,
    )  # fmt: skip
    model = ResNetForImageClassification(config)

    if options.forward_only:
        merging = InMergeCallback(lasting=False)
    else:
        merging = InMergeCallback(threshold=inmerge_fast.RankBudget())
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.out),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=2,
            optim="sgd",
            optim_args="momentum=0.9",
            learning_rate=0.05,
            weight_decay=5e-4,
            lr_scheduler_type="cosine",
            fp16=torch.cuda.is_available(),
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=4,
            report_to="tensorboard",
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=ByName(train_set),
        eval_dataset=ByName(val_set),
        compute_metrics=accuracy,
        callbacks=[merging],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    if options.forward_only:  # batch norm has the statistics of the merged network
        batches = trainer.get_train_dataloader()
        torch.optim.swa_utils.update_bn((batch["pixel_values"] for batch in batches), model)
        print(trainer.evaluate())
    print(merging.merger.summary())
    return model


if __name__ == "__main__":
    main()
