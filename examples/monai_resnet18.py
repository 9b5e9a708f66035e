"""A ResNet-18 on a medical .npz with MONAI's trainer, where merging is a handler.

    python examples/monai_resnet18.py                                # digits, no download
    python examples/monai_resnet18.py --data pneumoniamnist.npz --forward-only
    python examples/monai_resnet18.py --resume                       # to the bit as if it had never stopped

The handler asks the trainer for the network and the optimizer; in ``CheckpointSaver`` and ``CheckpointLoader`` it
stands beside them.
"""

from __future__ import annotations

import logging
import sys

import torch
from common import arguments, load
from ignite.engine import Events
from ignite.metrics import Accuracy
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import (
    CheckpointLoader,
    CheckpointSaver,
    LrScheduleHandler,
    StatsHandler,
    TensorBoardStatsHandler,
    ValidationHandler,
    from_engine,
)
from monai.networks.nets import ResNet
from monai.utils import set_determinism

import inmerge_fast
from inmerge_fast.integrations.ignite import InMergeHandler


def main(given: list[str] | None = None) -> torch.nn.Module:
    """Train, and return the network."""
    options = arguments(__doc__, given)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    set_determinism(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, val_set, classes = load(options)
    images, more = ([{"image": x, "label": y} for x, y in pairs] for pairs in (train_set, val_set))
    train_loader = DataLoader(Dataset(images), batch_size=2 * options.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(Dataset(more), batch_size=256)
    widths = [options.width << stage for stage in range(4)]
    model = ResNet(
        "basic", [2, 2, 2, 2], widths, spatial_dims=2, n_input_channels=train_set[0][0].shape[0], num_classes=classes,
        conv1_t_size=3, conv1_t_stride=1, no_max_pool=True,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)

    if options.forward_only:
        merging = InMergeHandler(lasting=False)
    else:
        merging = InMergeHandler(threshold=inmerge_fast.RankBudget())

    amp = torch.cuda.is_available()
    evaluator = SupervisedEvaluator(
        device, val_loader, model, amp=amp, decollate=False, val_handlers=[StatsHandler(iteration_log=False)],
        key_val_metric={"accuracy": Accuracy(output_transform=from_engine(["pred", "label"]))},
    )  # fmt: skip
    if options.forward_only:

        @evaluator.on(Events.STARTED)
        def restore_statistics() -> None:  # batch norm has collected those of the merged network
            torch.optim.swa_utils.update_bn((batch["image"].to(device) for batch in train_loader), model)

    first_loss = from_engine("loss", first=True)
    trainer = SupervisedTrainer(
        device, options.epochs, train_loader, model, optimizer, torch.nn.CrossEntropyLoss(), amp=amp,
        train_handlers=[
            merging, LrScheduleHandler(scheduler, print_lr=False), ValidationHandler(1, evaluator),
            StatsHandler(tag_name="loss", output_transform=first_loss, iteration_log=False),
            TensorBoardStatsHandler(log_dir=str(options.out), output_transform=first_loss),
        ],
    )  # fmt: skip
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "scheduler": scheduler, "inmerge": merging}
    CheckpointSaver(str(options.out), parts, save_interval=1, n_saved=1).attach(trainer)
    if options.resume:
        newest = max(options.out.glob("checkpoint_epoch=*.pt"), key=lambda path: path.stat().st_mtime)
        CheckpointLoader(str(newest), parts).attach(trainer)

    @trainer.on(Events.EPOCH_STARTED)
    def fix_order() -> None:  # of the images, also after resuming
        torch.manual_seed(trainer.state.epoch)

    trainer.run()
    print(merging.merger.summary())
    return model


if __name__ == "__main__":
    main()
