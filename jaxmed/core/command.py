"""How a command ends: exit code 0, or one clear line on stderr."""

import sys
from collections.abc import Callable

from jaxmed.core.errors import UserError
from jaxmed.core.files import is_full


def exit_code(run: Callable[..., int | None], *args) -> int:
    """`run(*args)`; bad input, a full disk and too little memory are one line and 2, an interruption is 130.

    Any other exception is a defect of ours, and keeps its traceback.
    """
    try:
        return run(*args) or 0
    except UserError as e:
        text = str(e)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on or begins again", file=sys.stderr, flush=True)
        return 130
    except MemoryError as e:
        text = out_of_memory(str(e))
    except OSError as e:
        if not is_full(e):
            raise
        text = f"cannot write {e.filename or 'a file'}: {e.strerror}; free space, then run the same command again"
    except RuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        text = out_of_memory(str(e))
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 2


def out_of_memory(detail: str) -> str:
    return (
        "too little memory: use smaller batches (predict, evaluate: --batch; training: input.batch_size, also that of "
        "each evals section, the largest of input.buckets, or more config.accumulate). "
        f"{' '.join(detail.split())[:150]}"
    )
