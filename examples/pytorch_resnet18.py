"""A ResNet-18 on a medical .npz in plain PyTorch: mixed precision, cosine schedule, EMA, accumulation, TensorBoard.

    python examples/pytorch_resnet18.py                                      # digits, no download
    python examples/pytorch_resnet18.py --data pneumoniamnist.npz --forward-only
    python examples/pytorch_resnet18.py --resume                             # to the bit as if it had never stopped

What merging adds to the script: ``InMerge(...).attach(optimizer)``, its state in the checkpoint, and its summary.
"""

from __future__ import annotations

import torch
from common import arguments, load, resnet18
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import inmerge_fast

ACCUMULATE, SEED = 2, 0


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Share of images that are judged right."""
    model.eval()
    right = [(model(x.to(device)).argmax(1) == y.to(device)).float() for x, y in loader]
    return torch.cat(right).mean().item()


def main(given: list[str] | None = None) -> nn.Module:
    """Train, and return the network."""
    options = arguments(__doc__, given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    train_set, val_set, classes = load(options)
    train_loader = DataLoader(train_set, options.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, 256)
    steps_per_epoch = len(train_loader) // ACCUMULATE  # optimizer steps, not batches
    steps = options.epochs * steps_per_epoch

    torch.manual_seed(SEED)
    model = resnet18(train_set[0][0].shape[0], classes, options.width).to(device)
    # Averaged over about the last tenth of the run.
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(max(0.0, 1 - 10 / steps)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    writer = SummaryWriter(options.out)
    loggers = [inmerge_fast.TensorBoardLogger(writer)]
    if options.forward_only:
        merger = inmerge_fast.InMerge(model, lasting=False, seed=SEED, loggers=loggers)
    else:
        merger = inmerge_fast.InMerge(
            model, threshold=inmerge_fast.RankBudget(), stop=steps, seed=SEED, loggers=loggers
        )
    merger.attach(optimizer)  # from here on each optimizer step merges; one that the scaler skips does not
    print(merger, merger.preview(), sep="\n")

    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler,
             "merger": merger}  # fmt: skip
    checkpoint, first_epoch = options.out / "last.pt", 0
    if options.resume:
        saved = torch.load(checkpoint, map_location=device)
        first_epoch = saved["epochs"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for epoch in range(first_epoch, options.epochs):
        torch.manual_seed(SEED + 1 + epoch)  # the order of the images, also after resuming
        model.train()
        total = 0.0
        for batch, (x, y) in enumerate(train_loader):
            with torch.autocast(device.type, dtype):
                loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            scaler.scale(loss / ACCUMULATE).backward()
            total += loss.item()
            if batch % ACCUMULATE == ACCUMULATE - 1:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                ema.update_parameters(model)
        # An average has no batch-norm statistics of its own, and with forward-only merging the model's are those of
        # the merged network.
        update_bn(train_loader, ema, device)
        accuracy = evaluate(ema, val_loader, device)
        print(f"epoch {epoch + 1}: loss {total / len(train_loader):.4f}, validation {100 * accuracy:.2f} %", flush=True)
        writer.add_scalar("loss", total / len(train_loader), epoch)
        writer.add_scalar("validation accuracy", accuracy, epoch)
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"epochs": epoch + 1}, checkpoint)

    merger.flush()
    print(merger.summary())
    merger.detach()
    writer.close()
    return ema.module


if __name__ == "__main__":
    main()
