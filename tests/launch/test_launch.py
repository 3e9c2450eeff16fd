"""Supervision, of real processes: a small script that does as its arguments say."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sacflow_robot.errors import DataError
from sacflow_robot.launch.cell import ProcessPlan, read_cell
from sacflow_robot.launch.process import State
from sacflow_robot.launch.supervisor import CellError, Supervisor, cell_table, duration

pytestmark = pytest.mark.realtime

# A program: `say TEXT`, `sleep S`, `fail STATUS`, `touch FILE`, `listen PORT`, `note FILE`, `deaf`, `spawn FILE`, in a row.
SCRIPT = """
import os, signal, socket, subprocess, sys, time
words = sys.argv[1:]
while words:
    word, words = words[0], words[1:]
    if word == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
        continue
    argument, words = words[0], words[1:]
    if word == "say":
        print(argument)
    elif word == "sleep":
        time.sleep(float(argument))
    elif word == "fail":
        sys.exit(int(argument))
    elif word == "once":
        if not os.path.exists(argument):
            open(argument, "w").close(); sys.exit(3)
    elif word == "listen":
        listening = socket.create_server(("127.0.0.1", int(argument)))
    elif word == "note":
        with open(argument, "a") as file: file.write(f"{os.getpid()}\\n")
    elif word == "on-stop":
        path, text = argument.split("=")
        def stop(*_, path=path, text=text):
            with open(path, "a") as file: file.write(text + "\\n")
            sys.exit(0)
        signal.signal(signal.SIGINT, stop)
    elif word == "spawn":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(argument, "w") as file: file.write(str(child.pid))
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script)]


def plan(name: str, line: str, **more: object) -> ProcessPlan:
    return ProcessPlan(name, tuple(line.split()), **more)  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that nobody waits for counts as ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.02)
    return False


def test_the_cell_ends_with_its_last_process_and_stops_the_others_in_order(program: list[str], tmp_path: Path) -> None:
    order = tmp_path / "order"
    cell = Supervisor(
        [
            plan("server", f"on-stop {order}=server say up sleep 600", ready="up"),
            plan("recorder", f"on-stop {order}=recorder say up sleep 600", ready="up"),
            plan("arm", "say moving fail 7"),
        ],
        program,
    )
    with pytest.raises(CellError, match="'arm' ended with exit status 7; it said last: moving"):
        cell.run()
    assert order.read_text().split() == ["recorder", "server"]
    assert [p.pid for p in cell.processes] == [None] * 3


def test_a_process_that_fails_stops_the_cell_and_is_quoted(program: list[str]) -> None:
    cell = Supervisor([plan("server", "say hello say no-such-file fail 4"), plan("arm", "sleep 600")], program)
    with pytest.raises(
        CellError, match=r"'server' ended first, with exit status 4; it said last: hello / no-such-file;"
    ):
        cell.run()
    assert cell.processes[1].pid is None


def test_one_that_is_not_ready_in_time_stops_the_cell(program: list[str]) -> None:
    first = plan("server", "say loading sleep 600", ready="serving", ready_within_s=0.5)
    with pytest.raises(CellError, match=r"'server' was not ready within 0.5 s; it said last: loading;"):
        Supervisor([first, plan("arm", "fail 0")], program).run()


def test_the_next_waits_until_a_port_listens(program: list[str], tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    order = tmp_path / "order"
    server = plan("server", f"sleep 0.7 note {order} listen {port} sleep 600", ready=f"tcp://127.0.0.1:{port}")
    Supervisor([server, plan("arm", f"note {order}")], program).run()
    assert len(order.read_text().split()) == 2


def test_the_next_waits_for_the_end_of_a_preparation(program: list[str], tmp_path: Path) -> None:
    order = tmp_path / "order"
    preparation = plan("demos", f"sleep 0.5 note {order}", ready="end")
    cell = Supervisor([preparation, plan("arm", f"note {order}")], program)
    cell.run()
    assert [p.state for p in cell.processes] == [State.DONE, State.DONE]


def test_a_preparation_that_was_made_is_not_made_again(program: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        preparation = plan("demos", f"note {tmp_path}/made", ready="end", unless=str(tmp_path / "made"))
        cell = Supervisor([preparation, plan("arm", "fail 0")], program)
        cell.run()
    assert len((tmp_path / "made").read_text().split()) == 1
    assert cell.processes[0].last_lines(1) == [f"not needed: {tmp_path}/made exists"]


def test_a_process_is_restarted_and_counted(program: list[str], tmp_path: Path) -> None:
    server = plan("server", f"once {tmp_path}/mark say up sleep 600", ready="up", restart="on-failure")
    cell = Supervisor([server, plan("arm", "sleep 0.2")], program)
    cell.run()
    assert cell.processes[0].restarts == 1


def test_restarts_have_an_end(program: list[str]) -> None:
    server = plan("server", "fail 5", restart="on-failure", restarts=1)
    with pytest.raises(CellError, match="exit status 5 after 1 restart"):
        Supervisor([server, plan("arm", "sleep 600")], program).run()


def test_one_that_may_end_does(program: list[str]) -> None:
    Supervisor([plan("trainer", "fail 0", may_end=True), plan("arm", "sleep 0.5")], program).run()
    with pytest.raises(CellError, match="'server' ended first, with exit status 0"):
        Supervisor([plan("server", "fail 0"), plan("arm", "sleep 600")], program).run()


def test_the_others_go_on_without_one_that_may_fail(program: list[str]) -> None:
    heard: list[tuple[str, str]] = []
    plans = [plan("trainer", "fail 3", may_fail=True), plan("arm", "sleep 0.5")]
    cell = Supervisor(plans, program, heard=lambda name, line: heard.append((name, line)))
    cell.run()
    assert [process.state for process in cell.processes] == [State.FAILED, State.DONE]
    assert [line for name, line in heard if "go on" in line] == [
        "failed with exit status 3; the others go on without it"
    ]
    with pytest.raises(CellError, match="ended with exit status 3"):
        Supervisor([plan("arm", "fail 3", may_fail=True)], program).run()


def test_deaf_ones_and_what_they_started_are_killed(program: list[str], tmp_path: Path) -> None:
    deaf = plan("server", f"deaf spawn {tmp_path}/pid say up sleep 600", ready="up", stop_within_s=0.4)
    cell = Supervisor([deaf, plan("arm", "fail 0")], program)
    cell.run()
    assert cell.processes[0].status == -signal.SIGKILL
    assert eventually(lambda: gone(int((tmp_path / "pid").read_text())))


def test_what_a_process_left_behind_is_killed(program: list[str], tmp_path: Path) -> None:
    Supervisor([plan("arm", f"spawn {tmp_path}/pid")], program).run()
    assert eventually(lambda: gone(int((tmp_path / "pid").read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent death signal")
def test_nothing_is_left_when_the_launcher_is_killed(program: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from sacflow_robot.launch.cell import ProcessPlan\n"
        "from sacflow_robot.launch.supervisor import Supervisor\n"
        f"Supervisor([ProcessPlan('arm', ('note', {str(tmp_path / 'pid')!r}, 'sleep', '600'))], {program!r}).run()\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    assert eventually((tmp_path / "pid").exists) and eventually(lambda: bool((tmp_path / "pid").read_text()))
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    launcher.kill()
    launcher.wait()
    assert eventually(lambda: gone(pid))


def test_ctrl_c_stops_a_launched_cell(tmp_path: Path) -> None:
    file = tmp_path / "cell.yaml"
    file.write_text(f"arm: top --server ipc://{tmp_path}/nobody\n")
    command = [
        sys.executable,
        "-m",
        "sacflow_robot",
        "launch",
        str(file),
        "--output",
        str(tmp_path / "output"),
        "--json",
    ]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert eventually((tmp_path / "output" / "arm.log").exists)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=60)
    if launcher.returncode == 130:
        assert "interrupted" in err
        assert '"processes": {"arm": {"status":' in out
    else:  # nobody answers 'top', and it may have said so first
        assert "process 'arm' ended" in err


def test_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACFLOW_TEST_LOG", "my log.zarr")
    file = tmp_path / "cell.yaml"
    file.write_text(
        "server: {run: 'serve --policy ${SACFLOW_TEST_POLICY:-a.onnx}', ready: serving, restart: on-failure, stop_within: 3}\n"
        "arm: run --log ${SACFLOW_TEST_LOG}\n"
    )
    server, robot = read_cell(file, ["serve", "run"])
    assert (server.words, server.ready, server.stop_within_s) == (("serve", "--policy", "a.onnx"), "serving", 3.0)
    assert robot == ProcessPlan("arm", ("run", "--log", "my log.zarr"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {run: serve, when: now}", "unknown key 'when'; valid keys: run, ready, ready_within, restart"),
        ("a: {ready: x}", "no command line under the key 'run'"),
        ("a: {run: serve, restart: always}", "restart is 'always'; it must be one of never, on-failure"),
        ("a: {run: serve, stop_within: 0}", "stop_within is 0; it must be above 0"),
        ("a: {run: serve, restarts: 1.5}", "restarts is 1.5; it must be a whole number"),
        ("a: {run: serve, restarts: true}", "restarts is True; it must be a whole number"),
        ("a: {run: serve, may_end: 1}", "may_end is 1; it must be true or false"),
        ("a: {run: 'serve ${NOT_SET_ANYWHERE}'}", "environment variable NOT_SET_ANYWHERE is not set"),
        ("a: {run: serve, terminal: true}\nb: {run: serve, terminal: true}", "only one process can have the terminal"),
        ("a: {run: serve, ready: end}", "nothing can wait for its end"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cell.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        read_cell(file, ["serve"])
    assert message in str(error.value)


def test_the_table_names_what_runs(program: list[str], tmp_path: Path) -> None:
    server = plan("server", f"on-stop {tmp_path}/x=x say [red]up\x1b[31m sleep 600", ready="up")
    cell = Supervisor([server, plan("arm", "fail 0")], program)
    cell.run()
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=100, record=True, file=nowhere)
        console.print(cell_table("cell", cell.processes))
    text = console.export_text()
    assert "server" in text and "[red]up" in text and "\x1b" not in text
    assert [duration(s) for s in (42.9, 187, 3723)] == ["42 s", "3:07", "1:02:03"]


def test_every_launch_file_shipped_can_be_read() -> None:
    from sacflow_robot.cli import COMMANDS, _parse, _split

    files = sorted((Path(__file__).parents[2] / "launch").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        plans = read_cell(file, COMMANDS)
        assert plans[-1].words[0] == "run", f"{file.name}: a cell is for its robot"
        for one in plans:
            _parse(*_split(list(one.words)))  # raises UsageError for an option that does not exist
