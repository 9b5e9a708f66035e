"""A ResNet-18 on a medical .npz with Lightning, where merging is a callback.

    python examples/lightning_resnet18.py                            # digits, no download
    python examples/lightning_resnet18.py --data pneumoniamnist.npz --forward-only
    python examples/lightning_resnet18.py --resume                   # to the bit as if it had never stopped

The callback needs no steps and no attaching: it follows the module's optimizer, tells a ``RankBudget`` the steps of the
run, and keeps its state in Lightning's checkpoints.
"""

from __future__ import annotations

import lightning
import torch
from common import arguments, load, resnet18
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, DistributedSampler

import inmerge_fast
from inmerge_fast.integrations.lightning import InMergeCallback


class Classifier(lightning.LightningModule):
    """Cross-entropy, SGD, and a cosine schedule by optimizer step."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.net = resnet18(channels, classes, width)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a micro-batch."""
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """The share of images that are judged right."""
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        """As many steps as the trainer will make, accumulation included."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(given: list[str] | None = None) -> torch.nn.Module:
    """Train, and return the network."""
    options = arguments(__doc__, given)
    lightning.seed_everything(0)
    train_set, val_set, classes = load(options)
    # Lightning tells this sampler the epoch, so that the order is the same after resuming.
    order = DistributedSampler(train_set, num_replicas=1, rank=0)
    train_loader = DataLoader(train_set, options.batch_size, sampler=order, drop_last=True)
    val_loader = DataLoader(val_set, 256)
    module = Classifier(train_set[0][0].shape[0], classes, options.width)

    if options.forward_only:
        merging = InMergeCallback(lasting=False)
    else:
        merging = InMergeCallback(threshold=inmerge_fast.RankBudget())
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=2,
        precision="16-mixed" if torch.cuda.is_available() else "bf16-mixed",
        callbacks=[merging, ModelCheckpoint(options.out, save_last=True, enable_version_counter=False)],
        logger=TensorBoardLogger(options.out),
        log_every_n_steps=4,
        devices=1,
    )
    trainer.fit(module, train_loader, val_loader, ckpt_path="last" if options.resume else None)
    if options.forward_only:  # batch norm has the statistics of the merged network
        torch.optim.swa_utils.update_bn(train_loader, module.net)
        trainer.validate(module, val_loader)
    print(merging.merger.summary())
    return module.net


if __name__ == "__main__":
    main()
