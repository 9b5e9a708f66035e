"""Reads PTX and AMD GCN assembly texts: memory accesses and arithmetic, and which function they come from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PTX_ACCESS = re.compile(r"\b(ld|st|atom|red)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b")
GCN_ACCESS = re.compile(r"\b(?:global|flat|buffer|scratch)_(load|store|atomic)_(\w+)")
PTX_MATH = re.compile(r"\b(fma|mul|add)\.rn\S*?\.f32(x2)?\b")
GCN_MATH = re.compile(r"\bv_(pk_)?(fma|fmac|fmamk|fmaak|mac|mad|mul|add)_(?:mix|legacy|f32|f16)")


PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)")
MATRIX_PRODUCT = re.compile(r"\b(wgmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*|v_mfma_\w+)")


def functions_of(file: Path) -> dict[int, str]:
    """Which top-level function each line of a source file belongs to."""
    tops = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {line: top.name for top in tops for line in range(top.lineno, top.end_lineno + 1)}


def attributed(asm: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The lines of an assembly text, each with the function of a source in ``folder`` that it comes from, or ""."""
    functions = {source.name: functions_of(source) for source in folder.glob("*.py")}
    names = {number: re.findall(r'"([^"]*)"', rest)[-1] for number, rest in re.findall(r"\.file\s+(\d+)(.*)", asm)}
    function, inline, placed = "", False, False
    for line in asm.splitlines():
        if "inline asm" in line:
            inline, placed = "begin" in line, False
        place = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if place and inline and placed:
            continue  # since Triton 3.8, one for each line of assembly, counted on from the source's
        if place:
            placed = True
            function = functions.get(Path(names[place[1]]).name, {}).get(int(place[2]), "")
        elif not line.lstrip().startswith(("//", ";")):
            yield function, line


def access(line: str) -> tuple[str, int] | None:
    """Whether a line loads, stores or changes global memory, and how many bytes per thread."""
    if found := PTX_ACCESS.search(line):
        kind = {"ld": "load", "st": "store"}.get(found[1], "atomic")
        return kind, int(found[2] or 1) * int(found[3]) // 8
    if found := GCN_ACCESS.search(line):
        words = re.search(r"dword(?:x(\d))?", found[2])
        size = 4 * int(words[1] or 1) if words else (2 if "short" in found[2] or "16" in found[2] else 1)
        return found[1], size
    return None


def arithmetic(line: str) -> tuple[str, int] | None:
    """What a line calculates in float32, and how often."""
    if found := PTX_MATH.search(line):
        return found[1], 2 if found[2] else 1
    if found := GCN_MATH.search(line):
        return ("fma" if found[2] not in ("mul", "add") else found[2]), 2 if found[1] else 1
    return None


def copy_to_shared(line: str) -> int | None:
    """How many bytes per thread a line copies from global to shared memory, past the registers."""
    found = PTX_COPY.search(line)
    return int(found[1], 16) if found else None


def matrix_product(line: str) -> str | None:
    """The instruction of a line that multiplies matrices."""
    found = MATRIX_PRODUCT.search(line)
    return found[1] if found else None


def unguarded_releases(asm: str) -> tuple[int, list[str]]:
    """Number of releasing atomics, and those without a barrier between them and the memory operation before them."""
    lines = asm.splitlines()
    releases, unguarded = 0, []
    for number, line in enumerate(lines):
        if not re.search(r"atom\S*\.(acq_rel|release)|buffer_wbl2", line):
            continue
        releases += 1
        for before in reversed(lines[:number]):
            if re.search(r"\b(bar\.sync|barrier\.sync|barrier\.cta\.sync|s_barrier)\b", before):
                break
            # In PTX the barrier must be in the same basic block.
            if access(before) or before.startswith("$L__BB"):
                unguarded.append(line.strip())
                break
        else:
            unguarded.append(line.strip())
    return releases, unguarded


def parameter_bits(asm: str, signature: dict[str, str]) -> dict[str, int]:
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    if ".amdgcn_target" in asm:
        bits = [8 * int(size) for size in re.findall(r"\.size:\s+(\d+)\n\s+\.value_kind:", asm)]
    else:
        bits = [int(size) for size in re.findall(r"\.param \.[ubf](\d+)\s", asm)]
    assert len(bits) >= len(names), "the parameters of the assembly text were not understood"
    return dict(zip(names, bits, strict=False))  # Triton's own come last
