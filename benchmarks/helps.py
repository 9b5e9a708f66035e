"""What ``--help`` of every command of this folder says: what it does, what it needs, and lines to copy."""

from __future__ import annotations

import argparse

TIMED = (
    "pip install -c constraints.txt -e '.[demo]'; a GPU is used where there is one. Figures worth keeping need a "
    "machine that does nothing else"
)


def parser_with(doc: str | None, needs: str, *examples: str, program: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring, what the command needs, and lines to copy."""
    text = (doc or "").replace("``", "").strip()
    lines = "\n".join(f"  {example}" for example in examples)
    epilog = f"needs: {needs}\n\nexample{'s' if len(examples) > 1 else ''}:\n{lines}"
    return argparse.ArgumentParser(
        prog=program or " ".join(examples[0].split()[:3]),  # python -m benchmarks.name
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
