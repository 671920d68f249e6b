"""`python -m hf_eva SCRIPT [arguments]` runs an unmodified script of transformers that then knows `--optim eva`."""

from __future__ import annotations

import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

USAGE = (
    "usage: python -m hf_eva SCRIPT [arguments of the script], for example: python -m hf_eva run_glue.py --optim eva"
)


def main() -> int:
    """Register Eva, then run the script as `python SCRIPT` would: its arguments, folder, tracebacks and exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        return 2 if len(sys.argv) < 2 else 0
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"hf_eva: {script} is not a file; {USAGE}", file=sys.stderr)
        return 2
    from hf_eva import register  # loads transformers, which takes seconds

    try:
        register()
    except RuntimeError as error:
        print(f"hf_eva: {error}", file=sys.stderr)
        return 1
    del sys.argv[0]
    if not sys.flags.safe_path:  # python -m has put the current folder there
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    run(os.path.join(os.getcwd(), script))  # which Python leaves as it was written
    leave_process_group()
    return 0


def run(path: str) -> None:
    """Run a file as the main module; `runpy` would replace `sys.argv[0]` and forget the module at its end."""
    loader = SourceFileLoader("__main__", path)
    module = sys.modules["__main__"] = ModuleType("__main__")
    vars(module).update(__file__=path, __cached__=None, __loader__=loader, __builtins__=__builtins__)
    try:
        exec(compile(loader.get_data(path), path, "exec", dont_inherit=True), vars(module))
    except BaseException as error:
        begin_in_script(error)
        raise


def leave_process_group() -> None:
    """
    End the threads of collectives that a script has left running. One that still drops a tensor while Python ends asks
    for the interpreter's lock, which may end that thread, and with it the process by SIGABRT.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def begin_in_script(error: BaseException) -> None:
    """Leave this file out of the traceback that ends the process, whichever hook shows it."""
    traceback = error.__traceback__
    while traceback and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    show = sys.excepthook
    sys.excepthook = lambda kind, value, _: show(kind, value.with_traceback(traceback), traceback)


if __name__ == "__main__":
    sys.exit(main())
