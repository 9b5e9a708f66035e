"""Files as people publish them, and what becomes of each. Makes the table in ``benchmarks/paper/FORMATS.md``."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import gzip
import json
import logging
import pathlib
import pickle
import tarfile
import types
import warnings
import zipfile

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from inmerge_fast.checkpoints.kinds import LEGACY

READ = "read"


def small_net():
    """Two convolutions, of which the second is transposed and grouped, with a batch norm between them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 3, groups=2))


NET = small_net()
STATE = NET.state_dict()
OTHER = {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in STATE.items()}


class Kind(enum.Enum):
    """An option of a training script."""

    FAST = "fast"


@dataclasses.dataclass
class Config:
    """The options of a training script."""

    rate: float = 0.1
    kind: Kind = Kind.FAST


class Options(dict):
    """A dict whose entries are attributes, as many projects have one."""


class Numbers(list):
    """A list with a name."""


class Marked(torch.Tensor):
    """A tensor of a class that the reader does not have."""


class Harmful:
    """What a malicious file holds: it would make a file when it is loaded."""

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("harmed"),))


class Evaluated:
    """The same by ``eval``."""

    def __reduce__(self):
        return (eval, ("open('harmed', 'w')",))


class Popen:
    """The same by a class of the standard library."""

    def __reduce__(self):
        import subprocess

        return (subprocess.Popen, (["touch", "harmed"],))


def saved(content, **how):
    """A writer of what ``torch.save`` makes of ``content``."""
    return lambda path: torch.save(content() if callable(content) and not isinstance(content, nn.Module) else content,
                                   path, **how)  # fmt: skip


def written(content):
    """A writer of these bytes."""
    return lambda path: path.write_bytes(content() if callable(content) else content)


def with_optimizer():
    """As ``torch.distributed.checkpoint`` saves a model and Adam's state, flattened."""
    net = small_net().eval()
    adam = torch.optim.Adam(net.parameters(), lr=0.0)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    adam.step()
    model, optimizer = get_state_dict(net, adam, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {"optim": optimizer, "model": model}


def flat_with_moments():
    """The same in one flat dict."""
    return {key: t for name, part in with_optimizer().items() for key, t in
            (part.items() if name == "model" else ((f"optim.{k}", v) for k, v in part.items()))
            if isinstance(t, torch.Tensor)}  # fmt: skip


def lightning():
    """As Lightning saves a module with its hyperparameters."""
    return {
        "epoch": 3, "global_step": 99, "pytorch-lightning_version": "2.6.0", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": {f"model.{key}": value for key, value in STATE.items()},
        "optimizer_states": [torch.optim.Adam(NET.parameters()).state_dict()],
        "hyper_parameters": Options(rate=0.1, folder=pathlib.PurePosixPath("a/b"), config=Config()),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "at": datetime.datetime(2026, 1, 1)}},
    }  # fmt: skip


def safetensors(path, tensors=None):
    """A safetensors file of these tensors."""
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in (tensors or STATE).items()}, path)


def safetensors_bytes(header, data=b"", length=None):
    """A safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(4, 1, 1), offsets=(0, 16)):
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def shards(folder, missing=False, binary=False):
    """A model in two files with an index."""
    folder.mkdir()
    ending, stem = ("bin", "pytorch_model") if binary else ("safetensors", "model")
    halves = dict(list(STATE.items())[:4]), dict(list(STATE.items())[4:])
    weight_map = {}
    for number, half in enumerate(halves, 1):
        name = f"{stem}-0000{number}-of-00002.{ending}"
        weight_map |= dict.fromkeys(half, name)
        if not (missing and number == 2):
            torch.save(half, folder / name) if binary else safetensors(folder / name, half)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def script(path):
    """A TorchScript archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(small_net()), path)


def exported(path):
    """An exported program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(small_net().eval(), (torch.randn(1, 3, 8, 8),)), path)


def archive(names):
    """A writer of a zip archive with these files."""

    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"content")

    return write


def tar(path):
    """A tar archive with a checkpoint in it."""
    inner = path.with_name("inner.pt")
    torch.save(STATE, inner)
    with tarfile.open(path, "w") as file:
        file.add(inner, "inner.pt")
    inner.unlink()


def compressed_tar(path):
    """The same, compressed."""
    tar(path.with_name("plain"))
    path.write_bytes(gzip.compress(path.with_name("plain").read_bytes()))


def content_of(write, cut=None, damage=None):
    """A writer of a file that was cut short, or of which a byte was changed."""

    def written_so(path):
        write(path)
        content = bytearray(path.read_bytes())
        if damage is not None:
            content[damage] ^= 0xFF
        path.write_bytes(content if cut is None else content[: int(cut * len(content))])

    return written_so


def folder_with(*names):
    """A writer of a folder with these files."""

    def write(path):
        path.mkdir()
        for name in names:
            torch.save(STATE, path / name) if name.endswith((".pt", ".bin")) else (path / name).write_bytes(b"x")

    return write


# What, name of the file, how it is made, and what comes of it: READ, or words of the one line that says why not.
FILES = [
    ("state dict (`torch.save`)", "a.pt", saved(STATE), READ),
    ("state dict, format of PyTorch before 1.6", "b.pth", saved(STATE, _use_new_zipfile_serialization=False), READ),
    ("`{'state_dict': ..., 'optimizer': ...}`", "c.pth.tar", saved({"epoch": 1, "state_dict": STATE, "optimizer":
     torch.optim.Adam(NET.parameters()).state_dict()}), READ),
    ("model and flattened Adam state", "d.pt", saved(with_optimizer), READ),
    ("model and Adam state in one flat dict", "e.pt", saved(flat_with_moments), READ),
    ("`DataParallel` / DDP (`module.`)", "f.pt", saved({f"module.{k}": v for k, v in STATE.items()}), READ),
    ("`torch.compile` (`_orig_mod.`), in DDP", "g.pt",
     saved({f"module._orig_mod.{k}": v for k, v in STATE.items()}), READ),
    ("`AveragedModel`", "h.pt", saved(lambda: torch.optim.swa_utils.AveragedModel(NET).state_dict()), READ),
    ("FSDP and activation checkpointing", "i.pt", saved({
     f"_fsdp_wrapped_module.{k[0]}._checkpoint_wrapped_module{k[1:]}": v for k, v in STATE.items()}), READ),
    ("numbers as keys", "j.pt", saved(dict(enumerate(STATE.values()))), READ),
    ("list of tensors", "k.pt", saved(list(STATE.values())), READ),
    ("Lightning checkpoint", "l.ckpt", saved(lightning), READ),
    ("NumPy scalars and arrays beside it", "m.pt", saved({"model": STATE, "best": np.float64(0.9), "at": np.int32(3),
     "curve": np.linspace(0, 1, 5)}), READ),
    ("NumPy arrays as weights", "n.pt", saved({k: v.numpy() for k, v in STATE.items()}), READ),
    ("`argparse.Namespace`, paths, dates, sets", "o.pt", saved({"model": STATE, "args": argparse.Namespace(
     lr=0.1, out=pathlib.PurePosixPath("x")), "day": datetime.date(2026, 1, 1), "seen": {1, 2},
     "by": collections.defaultdict(list, a=[1]), "n": collections.Counter("aab"), "last": collections.deque([1, 2], 3),
     "random": np.random.RandomState(0), "make": functools.partial(dict, a=1),
     "also": types.SimpleNamespace(a=range(3)), "log": logging.getLogger("x")}), READ),
    ("objects of the project's own classes", "p.pt",
     saved({"model": STATE, "config": Config(), "o": Options(a=1), "n": Numbers([1, 2])}), READ),
    ("whole model (`torch.save(model)`)", "q.pt", saved(NET), READ),
    ("`{'model': model, 'ema': model}`", "r.pt", saved({"ema": NET, "model": NET, "optimizer": None}), READ),
    ("a subclass of `Tensor`", "s.pt", saved({k: v.as_subclass(Marked) for k, v in STATE.items()}), READ),
    ("tree of modules instead of dotted keys", "t.pt",
     saved({str(i): m.state_dict() for i, m in enumerate(NET)}), READ),
    ("TorchScript", "u.pt", script, READ),
    ("exported program", "v.pt2", exported, READ),
    ("safetensors", "w.safetensors", safetensors, READ),
    ("safetensors named `.pt`", "x.pt", safetensors, READ),
    ("`.pt` named `.safetensors`", "y.safetensors", saved(STATE), READ),
    ("safetensors shards, folder with their index", "z", shards, READ),
    ("`pytorch_model.bin` shards", "aa", lambda path: shards(path, binary=True), READ),
    ("folder with one file of weights", "ab", folder_with("net.pt", "config.json"), READ),
    ("`.npz`", "ac.npz", lambda path: np.savez(path, **{k: v.numpy() for k, v in STATE.items()}), READ),
    ("`.npy`", "ad.npy", lambda path: np.save(path, STATE["0.weight"].numpy()), READ),
    ("a missing file", "ba.pt", lambda path: None, "there is no file"),
    ("a loop of links", "bb.pt", lambda path: path.symlink_to(path), "cannot be opened"),
    ("an empty file", "bc.pt", written(b""), "the file is empty"),
    ("an empty safetensors file", "bd.safetensors", written(b""), "the file is empty"),
    ("a Git LFS pointer", "be.safetensors", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:"
     + b"0" * 64 + b"\nsize 46830571\n"), "Git LFS pointer"),
    ("an HTML page", "bf.pt", written(b"\n<!DOCTYPE html><html><body>404</body></html>"), "an HTML page"),
    ("an XML error", "bg.bin", written(b"<?xml version='1.0'?><Error><Code>Denied</Code></Error>"), "(or XML)"),
    ("a JSON file", "bh.bin", written(b'{"model_type": "resnet"}'), "a JSON file, not weights"),
    ("a text file", "bi.pt", written("weights: see the Größe link\n".encode()), "a text file instead of weights"),
    ("other bytes", "bj.pt", written(bytes(range(128, 256)) * 3), "no checkpoint of any known format"),
    ("zeros, as of a failed copy", "bk.pt", written(bytes(5000)), "no checkpoint of any known format"),
    ("a cut checkpoint", "bl.pt", content_of(saved(STATE), cut=0.7), "cut short"),
    ("a cut checkpoint of the old format", "bm.pt",
     content_of(saved(STATE, _use_new_zipfile_serialization=False), cut=0.8), "damaged"),
    ("the first bytes of an old one", "bn.pt", written(b"\x80\x02" + LEGACY[0] + b"\x80\x02M\xe9\x03."), "damaged"),
    ("a checkpoint with a damaged byte in its pickle", "bn2.pt", content_of(saved(STATE), damage=150), "damaged"),
    ("`torch.save(..., pickle_protocol=4)`", "bn3.pt", saved({"model": STATE, "o": Config()}, pickle_protocol=4),
     "pickled by a protocol"),
    ("a zip archive that is no checkpoint", "bo.zip", archive(["a.txt", "net.pt"]),
     "no checkpoint, with 'a.txt', 'net.pt'"),
    ("a Keras 3 model", "bp.keras", archive(["metadata.json", "model.weights.h5"]), "a Keras model"),
    ("an HDF5 file", "bq.h5", written(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5 file"),
    ("a tar archive", "br.tar", tar, "a tar archive with 'inner.pt'"),
    ("a compressed archive", "bs.tar.gz", compressed_tar, "compressed with gzip; unpack it first"),
    ("GGUF", "bt.gguf", written(b"GGUF" + bytes(50)), "GGUF"),
    ("a pickle of its own", "bu.pkl", written(lambda: pickle.dumps({"a": np.ones((4, 3, 3))})),
     "torch.save did not write"),
    ("a picture", "bv.pt", written(b"\x89PNG\r\n\x1a\n" + bytes(50)), "a PNG image"),
    ("an optimizer's state", "bw.pt", saved(lambda: torch.optim.Adam(NET.parameters()).state_dict()),
     "an optimizer's state"),
    ("no tensors", "bx.pt", saved({"epoch": 3}), "no state dict in it"),
    ("a list of numbers", "by.pt", saved([1, 2]), "no state dict in it, a list"),
    ("a file that calls a function", "bz.pt", saved({"state_dict": STATE, "x": Harmful()}),
     "it asks for pathlib.Path.touch"),
    ("the same in the old format", "ca.pt", saved({"state_dict": STATE, "x": Harmful()},
     _use_new_zipfile_serialization=False), "it asks for pathlib.Path.touch"),
    ("a file that calls `eval`", "cb.pt", saved({"state_dict": STATE, "x": Evaluated()}), "it calls builtins.eval"),
    ("a file that starts a program", "cc.pt", saved({"state_dict": STATE, "x": Popen()}), "it calls subprocess.Popen"),
    ("whole model in the old format", "cd.pt", saved(NET, _use_new_zipfile_serialization=False),
     "it holds an object of the class torch.nn.modules.container.Sequential"),
    ("safetensors: cut header", "da.safetensors", content_of(safetensors, cut=0.1), "cut short: its header"),
    ("safetensors: cut data", "db.safetensors", content_of(safetensors, cut=0.9), "cut short: tensor"),
    ("safetensors: length of the header damaged", "dc.safetensors", written(
     safetensors_bytes({}, length=1 << 39)), "its header would have"),
    ("safetensors: header is no JSON", "dd.safetensors", written(safetensors_bytes(b"{'a': 1}")),
     "its header is no JSON"),
    ("safetensors: a name twice", "de.safetensors", written(safetensors_bytes(
     b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
     bytes(4))), "a name stands in it twice"),
    ("safetensors: overlapping tensors", "df.safetensors", written(safetensors_bytes(
     {"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24))), "'a' and 'b' overlap"),
    ("safetensors: shape and bytes differ", "dg.safetensors", written(safetensors_bytes(
     {"a": entry(shape=(5, 1, 1))}, bytes(16))), "has 16 bytes"),
    ("safetensors: negative offset", "dh.safetensors", written(safetensors_bytes(
     {"a": entry(offsets=(-4, 12))}, bytes(16))), "not what the format says"),
    ("safetensors: an entry without shape", "di.safetensors", written(safetensors_bytes(
     {"a": {"dtype": "F32"}}, bytes(16))), "not what the format says"),
    ("safetensors: only dtypes of the future", "dj.safetensors", written(safetensors_bytes(
     {"a": entry("F6_E2M3", (4, 4, 1))}, bytes(16))), "has dtype F6_E2M3"),
    ("a missing shard", "dk", lambda path: shards(path, missing=True), "model-00002-of-00002.safetensors is missing"),
    ("a folder of many files", "dl", folder_with("a.pt", "b.pt"), "name one of its files; it holds a.pt, b.pt"),
    ("a folder without weights", "dm", folder_with("README.md"), "there are no weights in it; it holds README.md"),
    ("a distributed checkpoint", "dn", folder_with(".metadata", "__0_0.distcp"), "dcp_to_torch"),
    ("TensorFlow's SavedModel", "do", folder_with("saved_model.pb"), "a model of TensorFlow"),
    ("`.npz` of objects", "dp.npz", lambda path: np.savez(path, a=np.array([{}, None], object)),
     "NumPy array of object"),
]  # fmt: skip


def table():
    """The table of formats, as it stands in ``benchmarks/paper/FORMATS.md``."""
    lines = [
        "# Files of weights, and what becomes of each",
        "",
        "What `python -m inmerge_fast inspect` makes of files as people publish them. `tests/test_checkpoints.py` "
        "writes",
        "and reads each; nothing in any of them is executed. `python tests/checkpoint_files.py` remakes this table.",
        "",
        "| file | outcome |",
        "| --- | --- |",
    ]
    for what, _, _, outcome in FILES:
        said = "read" if outcome == READ else f'refused: "... {outcome} ..."'.replace("|", "\\|")
        lines.append(f"| {what} | {said} |")
    lines.append("| ONNX | read where the package `onnx` is installed, with the groups of its convolutions |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (pathlib.Path(__file__).parents[1] / "benchmarks" / "paper" / "FORMATS.md").write_text(table())
