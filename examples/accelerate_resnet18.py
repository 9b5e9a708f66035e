"""A ResNet-18 on a medical .npz in a loop of accelerate, which needs no callback.

    python examples/accelerate_resnet18.py                           # digits, no download
    accelerate launch examples/accelerate_resnet18.py --data pneumoniamnist.npz --forward-only
    python examples/accelerate_resnet18.py --resume                  # to the bit as if it had never stopped

``InMerge`` takes the prepared model and attaches to the prepared optimizer, which knows when a step is really taken;
``register_for_checkpointing`` saves it with the rest.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import arguments, load, resnet18
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

import inmerge_fast


def main(given: list[str] | None = None) -> torch.nn.Module:
    """Train, and return the network."""
    options = arguments(__doc__, given)
    accelerator = Accelerator(
        mixed_precision="fp16" if torch.cuda.is_available() else "bf16",
        gradient_accumulation_steps=2,
        log_with="tensorboard",
        project_dir=options.out,
        step_scheduler_with_optimizer=True,
    )
    accelerator.init_trackers("logs")
    set_seed(0)
    train_set, val_set, classes = load(options)
    model = resnet18(train_set[0][0].shape[0], classes, options.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train_loader, val_loader, model, optimizer = accelerator.prepare(
        DataLoader(train_set, options.batch_size, shuffle=True, drop_last=True), DataLoader(val_set, 256),
        model, optimizer,
    )  # fmt: skip
    steps = options.epochs * len(train_loader) // accelerator.gradient_accumulation_steps
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def log(row: dict) -> None:
        numbers = {name: row[name] for name in ("sampled", "merged", "mean_similarity", "max_similarity")}
        accelerator.log({f"inmerge/{name}": value for name, value in numbers.items()}, step=row["step"])

    if options.forward_only:
        merger = inmerge_fast.InMerge(model, lasting=False, loggers=[log])
    else:
        merger = inmerge_fast.InMerge(model, threshold=inmerge_fast.RankBudget(), stop=steps, loggers=[log])
    merger.attach(optimizer)
    accelerator.register_for_checkpointing(scheduler, merger)

    checkpoint, first_epoch = options.out / "last", 0
    if options.resume:
        accelerator.load_state(str(checkpoint))
        first_epoch = merger.step_count * accelerator.gradient_accumulation_steps // len(train_loader)

    for epoch in range(first_epoch, options.epochs):
        torch.manual_seed(epoch)  # the order of the images, also after resuming
        model.train()
        for x, y in train_loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                optimizer.zero_grad()
        if options.forward_only:  # batch norm has the statistics of the merged network
            update_bn(train_loader, model)
        model.eval()
        with torch.no_grad():
            right = [accelerator.gather_for_metrics(model(x).argmax(1) == y).float() for x, y in val_loader]
        accuracy = torch.cat(right).mean().item()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}, validation {100 * accuracy:.2f} %")
        accelerator.log({"validation accuracy": accuracy}, step=merger.step_count)
        accelerator.save_state(str(checkpoint))

    merger.flush()
    accelerator.print(merger.summary())
    merger.detach()
    accelerator.end_training()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
