"""``InMerge.attach``: one merge for each step that is taken, after all that it writes, whatever wraps the optimizer."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from oracle import assert_same_bits
from test_training import batches, loss_of, net, optimizer_of

from inmerge_fast import InMerge

SETTINGS = {"threshold": -1.0, "prob": 0.5, "alpha": 0.75, "skip_first": 0, "guard": None}
STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def one_call(model, optimizer, x):
    loss_of(model, x).backward()
    optimizer.step()
    model.zero_grad()


def closure(model, optimizer, x):
    def again():
        model.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    again()
    optimizer.step(again)


def two_calls(model, optimizer, x):
    loss_of(model, x).backward()
    optimizer.first_step()
    model.zero_grad()
    loss_of(model, x).backward()
    optimizer.second_step()
    model.zero_grad()


def assert_as_by_hand(make, how=one_call):
    """Attached to what ``make`` returns it does what ``merger.step()`` does after each of its steps."""
    torch.manual_seed(0)
    model, twin = net(), net()
    for target in (model, twin):
        target[1].eval()  # it would count the passes of a closure
    twin.load_state_dict(model.state_dict())
    optimizer, other = make(model), make(twin)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    by_hand, merged = InMerge(twin, **SETTINGS), 0
    for x in batches(STEPS):
        how(model, optimizer, x)
        how(twin, other, x)
        merged += by_hand.step().merged
    assert merger.step_count == by_hand.step_count == STEPS
    assert merged > 10
    for name, value in twin.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
    merger.detach()
    how(model, optimizer, x)
    assert merger.step_count == STEPS
    return optimizer


class AroundAnother(torch.optim.Optimizer):
    """As timm's Lookahead: the dicts of hooks and no ``super().__init__``; it writes after the step of the other."""

    def __init__(self, base):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self._base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, {}

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._base.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.clamp_(-0.2, 0.2)
        return loss

    def state_dict(self):
        return self._base.state_dict()

    def load_state_dict(self, state):
        self._base.load_state_dict(state)
        self.param_groups = self._base.param_groups


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware, as most are written: it puts the old memory back, steps, and scales what came out."""

    def __init__(self, params, **settings):
        super().__init__(params, settings)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def _all(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self):
        self.old = [p.data.clone() for p in self._all()]
        for p in self._all():
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self):
        for p, old in zip(self._all(), self.old, strict=True):
            p.data = old
        self.base_optimizer.step()
        for p in self._all():
            p.mul_(0.99)

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class SharpnessByItself(Sharpness):
    """The same without another optimizer inside."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        del self.base_optimizer

    @torch.no_grad()
    def second_step(self):
        for p, old in zip(self._all(), self.old, strict=True):
            p.data = old
            p.sub_(p.grad, alpha=0.05)


class Several:
    """No Optimizer itself."""

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


class Clamped(torch.optim.Adam):
    """Calls the step of its parent, after which PyTorch calls the hooks for the first time."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.clamp_(-0.2, 0.2)


def clamped(model):
    torch.optim.Adam(model.parameters())  # from the first one on the class calls hooks
    return Clamped(model.parameters())


def scheduled(make):
    def made(model):
        optimizer = make(model)
        optimizer.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return optimizer

    return made


def several(model):
    return Several(sgd(model[:3]), torch.optim.AdamW(model[3:].parameters()))


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (sgd, one_call),
        (scheduled(sgd), one_call),
        (clamped, one_call),
        (scheduled(clamped), one_call),
        (lambda m: AroundAnother(sgd(m)), one_call),
        (lambda m: AroundAnother(AroundAnother(clamped(m))), one_call),
        (lambda m: Sharpness(m.parameters(), lr=0.05), two_calls),
        (lambda m: Sharpness(m.parameters(), lr=0.05), closure),
        (scheduled(lambda m: Sharpness(m.parameters(), lr=0.05)), closure),
        (lambda m: AroundAnother(Sharpness(m.parameters(), lr=0.05)), closure),
        (lambda m: SharpnessByItself(m.parameters(), lr=0.05), two_calls),
        (lambda m: SharpnessByItself(m.parameters(), lr=0.05), closure),
        (several, one_call),
        (lambda m: torch.optim.LBFGS(m.parameters(), lr=0.05, max_iter=30), closure),
        (lambda m: copy.copy(sgd(m)), one_call),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_is_merged_once_after_all_that_it_writes(make, how):
    assert_as_by_hand(make, how)


def test_pytorchs_own_wrappers():
    """One rank: what they write after the inner step is there, but agrees with what there was."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        averager = PeriodicModelAverager
        assert_as_by_hand(lambda m: PostLocalSGDOptimizer(sgd(m), averager(period=2, warmup_steps=0)))
        assert_as_by_hand(lambda m: ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, lr=0.05))
        model = net()
        overlapped = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.05)
        with pytest.raises(ValueError, match="steps in the middle of backward"):
            InMerge(model).attach(overlapped)
    finally:
        dist.destroy_process_group()


def test_accelerates_optimizer_follows_accumulation_and_the_scaler():
    accelerate = pytest.importorskip("accelerate")
    assert_as_by_hand(lambda m: accelerate.Accelerator(cpu=True).prepare(sgd(m)))
    assert_as_by_hand(lambda m: accelerate.Accelerator(cpu=True).prepare(AroundAnother(clamped(m))))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(net(), optimizer_of("sgd", net()))
    optimizer = accelerator.prepare(sgd(model))
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    for x in batches(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            optimizer.step()
            optimizer.zero_grad()
    assert merger.step_count == 3
    scaler, inner = torch.amp.GradScaler("cpu", init_scale=8.0), sgd(model)
    scaled = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    merger.detach()
    merger.attach(scaled)
    for factor, counted in ((1.0, 4), (torch.inf, 4), (1.0, 5)):
        scaler.scale(loss_of(model, x) * factor).backward()
        scaled.step()
        scaled.zero_grad()
        assert merger.step_count == counted


def test_fabrics_optimizer():
    lightning = pytest.importorskip("lightning")

    def make(model):
        return lightning.Fabric(accelerator="cpu", devices=1).setup(model, sgd(model))[1]

    assert_as_by_hand(make)


def test_timms_lookahead():
    timm = pytest.importorskip("timm.optim", reason="timm needs torchvision; AroundAnother stands in for its Lookahead")
    assert_as_by_hand(lambda m: timm.Lookahead(sgd(m), k=2))
    assert_as_by_hand(lambda m: timm.create_optimizer_v2(m, opt="lookahead_adamw", lr=0.01))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_wrappers_of_pytorch_optimizer():
    reason = "pytorch_optimizer is no dependency; Sharpness stands in for what it has, but not for all its variants"
    wrappers = pytest.importorskip("pytorch_optimizer", reason=reason)
    settings = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "rho": 0.05}
    for how in (two_calls, closure):
        assert_as_by_hand(lambda m: wrappers.SAM(m.parameters(), **settings), how)
        assert_as_by_hand(lambda m: wrappers.LookSAM(m.parameters(), **settings), how)
        assert_as_by_hand(lambda m: wrappers.WSAM(m, m.parameters(), momentum=0.9, **settings), how)
    assert_as_by_hand(lambda m: wrappers.Lookahead(sgd(m), k=2))
    assert_as_by_hand(lambda m: wrappers.PCGrad(sgd(m)))
    assert_as_by_hand(lambda m: wrappers.TRAC(sgd(m)))


def test_what_cannot_be_followed_is_refused_with_what_to_attach_to():
    model = net()
    merger = InMerge(model)
    optimizer = sgd(model)

    class NoOptimizer:
        def __init__(self):
            self._optimizer = optimizer
            self.step_and_update = optimizer.step

    class WithoutHooks(torch.optim.Optimizer):
        def __init__(self):
            self.param_groups = optimizer.param_groups

        def step(self):
            pass

    replaced = sgd(model)
    step = replaced.step
    replaced.step = lambda: step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for given, error, match in (
        (NoOptimizer(), TypeError, r"got NoOptimizer; attach to its _optimizer \(SGD\)"),
        (schedule, TypeError, r"got StepLR; attach to its optimizer \(SGD\)"),
        (model, TypeError, "must be a torch.optim.Optimizer"),
        (torch.optim.SGD, TypeError, "must be a torch.optim.Optimizer"),
        (None, TypeError, "must be a torch.optim.Optimizer"),
        (WithoutHooks(), ValueError, r"WithoutHooks has no hooks.*call merger.step\(\)"),
        (Several(WithoutHooks()), ValueError, "WithoutHooks, inside the Several, has no hooks"),
        (replaced, ValueError, "has had its step replaced by .*lambda.*, which may call no hooks"),
        (AroundAnother(sgd(net())), ValueError, "holds none of the weights that are merged"),
    ):
        with pytest.raises(error, match=match):
            merger.attach(given)
        assert not merger.attached
    merger.attach(optimizer)


def test_a_step_that_fails_after_the_inner_one_is_not_merged_with_the_next_call():
    class Fails(AroundAnother):
        def step(self, closure=None):
            self._base.step(closure)
            raise ArithmeticError

        def first_step(self):
            pass

    model = net()
    optimizer = Fails(sgd(model))
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.first_step()
    assert merger.step_count == 0
    optimizer._base.step()
    assert merger.step_count == 1


def test_what_is_attached_to_is_left_as_it_was():
    model = net()
    optimizer = AroundAnother(clamped(model))
    before = [dict(vars(one)) for one in (optimizer, optimizer._base)]
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    assert "step" in vars(optimizer)
    merger.detach()
    merger.detach()
    assert [dict(vars(one)) for one in (optimizer, optimizer._base)] == before
    merger.attach(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer._base, 1)  # wraps the step in turn
    merger.detach()
    one_call(model, optimizer, batches(1)[0])
    schedule.step()
    assert merger.step_count == 0


def test_a_copy_of_what_is_attached_to_is_not():
    """The weights of a deep copy are others, and nothing merges them; it steps as before."""
    model = net()
    optimizer = clamped(model)
    merger = InMerge(model, **SETTINGS).attach(optimizer)
    x = batches(1)[0]
    for copied in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        one_call(*copied, x)
    assert merger.step_count == 0
    again = InMerge(copied[0], **SETTINGS).attach(copied[1])
    one_call(*copied, x)
    assert (merger.step_count, again.step_count) == (0, 1)
    several = copy.deepcopy(Several(sgd(model)))  # has no __getstate__ that leaves anything out
    merger.detach()
    merger.attach(Several(sgd(model)))
    copy.deepcopy(merger._attached._replaced[0][0]).step()
    several.step()
    assert merger.step_count == 0
