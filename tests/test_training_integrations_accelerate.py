"""``InMerge`` in a loop of accelerate: its optimizer, accumulation, checkpoints, mixed precision, two processes."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training import loss_of, net
from trainers import ACCUMULATE, DATA, RECIPE, STEPS, assert_as_plain, assert_same_weights, forward_loop, plain_loop

from inmerge_fast import InMerge

accelerate = pytest.importorskip("accelerate")

FORWARD = {"lasting": False, "seed": 3}
BOTH = pytest.mark.parametrize("recipe", [RECIPE, FORWARD], ids=["lasting", "forward-only"])
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::inmerge_fast.NoEffectWarning"
)


@pytest.fixture(autouse=True)
def one_accelerator_per_test():
    """What accelerate keeps for the whole process: mixed precision and the steps that accumulate.

    Before as well as after: a Hugging Face Trainer leaves its data loader there at its end, and each micro-batch of a
    loop that comes next is then the last of an epoch, with an optimizer step of its own.
    """
    _forget()
    yield
    _forget()


def _forget():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """The recipe for accelerate: prepare, attach to the prepared optimizer, register for checkpoints."""

    def __init__(self, recipe, **settings):
        settings = {"cpu": True, "gradient_accumulation_steps": ACCUMULATE} | settings
        self.accelerator = accelerate.Accelerator(**settings)
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.merger = InMerge(self.model, **recipe).attach(self.optimizer)
        self.accelerator.register_for_checkpointing(self.merger)

    def epoch(self, data=DATA):
        for x in data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, x))
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self


@BOTH
def test_gives_the_same_weights_as_a_plain_loop(recipe):
    run = Run(recipe).epoch()
    run.merger.detach()
    assert run.merger.summary().merged > 0
    assert_as_plain(run.model, run.merger, plain_loop() if recipe is RECIPE else forward_loop(FORWARD))


def test_what_cannot_be_attached_says_so():
    """Before there is an optimizer, to the Accelerator itself, and twice."""
    run = Run(RECIPE)
    with pytest.raises(RuntimeError, match="attached already"):
        run.merger.attach(run.optimizer)
    run.merger.detach()
    with pytest.raises(TypeError, match="got NoneType: make the optimizer first, and attach to it"):
        run.merger.attach(None)
    with pytest.raises(TypeError, match=r"got Accelerator; attach to its _optimizers\[0\] \(AcceleratedOptimizer\)"):
        run.merger.attach(run.accelerator)


@BOTH
def test_resumes_to_the_bit_from_its_checkpoint(tmp_path, recipe):
    whole = Run(recipe).epoch().epoch()
    half = Run(recipe).epoch()
    half.accelerator.save_state(str(tmp_path))
    resumed = Run(recipe)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.merger.state_dict() == half.merger.state_dict()
    resumed.epoch()
    assert resumed.merger.step_count == 2 * STEPS
    assert_same_weights(resumed.model, whole.model)


@BOTH
def test_a_checkpoint_that_is_saved_within_an_accumulation_has_the_weights_as_they_are(tmp_path, recipe):
    run = Run(recipe).epoch()
    before = {name: value.clone() for name, value in run.accelerator.unwrap_model(run.model).named_parameters()}
    run.epoch(DATA[:1])
    run.accelerator.save_state(str(tmp_path), safe_serialization=False)
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for name, value in before.items():
        assert torch.equal(saved[name], value), name


@BOTH
def test_mixed_precision_gives_the_same_weights_as_autocast(recipe):
    run = Run(recipe, mixed_precision="bf16").epoch()
    run.merger.detach()
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    merger = InMerge(model, **recipe).attach(optimizer)
    for index, x in enumerate(DATA):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        loss = torch.nn.functional.cross_entropy(out.float(), torch.arange(len(x)) % 4)  # accelerate gives float32
        (loss / ACCUMULATE).backward()
        if index % ACCUMULATE == ACCUMULATE - 1:
            optimizer.step()
            optimizer.zero_grad()
    merger.detach()
    assert run.merger.summary().merged == merger.summary().merged > 0
    assert_same_weights(run.model, model)


def _train_on_this_rank(rank, recipe, folder):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used once there is a group
    os.environ |= where | {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run = Run(recipe)
    assert run.accelerator.num_processes == 2
    share = DATA[run.accelerator.process_index :: run.accelerator.num_processes]
    assert len(share) == len(DATA) // 2
    run.epoch(share)
    assert run.merger.step_count == len(share) // ACCUMULATE
    run.merger.detach()
    torch.save(run.accelerator.unwrap_model(run.model).state_dict(), f"{folder}/{run.accelerator.process_index}")
    dist.barrier()
    os._exit(0)  # see test_distributed.py: teardown has once ended in std::terminate, after everything had passed


@BOTH
def test_two_processes_train_one_model(tmp_path, recipe):
    # Not accelerate's debug_launcher: it forks, and a backward pass on a build for CUDA forbids that from then on.
    mp.spawn(_train_on_this_rank, (recipe, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    parameters = [name for name, _ in net().named_parameters()]
    assert all(torch.equal(first[name], second[name]) for name in parameters)
    untrained = plain_loop(epochs=0)[0].state_dict()
    assert not torch.equal(first["3.weight"], untrained["3.weight"])
