"""`llmwd-ctl`: the operator's program. It reads the workers' retained facts and gives orders at their desks.

Nothing here is needed for safety, and reading needs no worker's help. Each verb has to answer within
0.3 s, so modules that cost time (zmq, rich, the configuration) are imported where they are needed.
"""

import click

from llmwd import __version__
from llmwd.ctl.completion import completion
from llmwd.ctl.drill import drill
from llmwd.ctl.ending import reload, stop
from llmwd.ctl.explain import explain
from llmwd.ctl.history import history
from llmwd.ctl.key import key
from llmwd.ctl.logs import logs
from llmwd.ctl.models import check, models
from llmwd.ctl.orders import give_back, notify, reset, resume, switch
from llmwd.ctl.program import NAME, Program, examples
from llmwd.ctl.release import release
from llmwd.ctl.report import report
from llmwd.ctl.simulate import simulate
from llmwd.ctl.status import status
from llmwd.ctl.welcome import welcome


@click.command(
    cls=Program,
    name=NAME,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("llmwd-ctl status", "llmwd-ctl switch qwen3-coder-fp8 --wait", "llmwd-ctl yield --for 2h"),
)
@click.version_option(__version__, prog_name=NAME)
def main() -> None:
    """Look at llmwd on this node, and tell it what to do.

    Exit codes: 0 done, 1 refused (or the output could not be written), 2 usage, 3 no supervisor running, 4 timed out.
    """


for verb in (
    status, switch, models, give_back, resume, stop, logs, history, report, drill, simulate, explain, check, reload, reset, notify, key, completion, welcome, release,
):  # fmt: skip
    main.add_command(verb)


if __name__ == "__main__":
    main()
