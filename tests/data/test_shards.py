"""Work in shards: what is missing is computed, and nothing else, here and on a Ray cluster of two nodes."""

import functools
import json
import os
from pathlib import Path

import pytest

from omnimamba.data.shards import Work, join_lines, run_here, run_on_ray


class Squares:
    """A worker that can be sent to another process."""

    def __call__(self, items: range, file: Path) -> None:
        file.write_text("".join(json.dumps({"item": i, "square": i * i, "by": os.getpid()}) + "\n" for i in items))


def work(folder, **changes):
    return Work(**{"out": folder / "squares.jsonl", "num_items": 11, "shard_size": 3, "plan": {"of": "squares"}} | changes)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_all_of_it(tmp_path):
    squares, seen = work(tmp_path), []
    squares.start()
    run_here(squares, Squares, lambda *progress: seen.append(progress))
    assert seen == [(3, 11), (6, 11), (9, 11), (11, 11)] and not squares.out.exists()
    squares.finish(join_lines)
    assert [row["square"] for row in lines(squares.out)] == [i * i for i in range(11)]
    assert list(tmp_path.iterdir()) == [squares.out]


def test_only_what_is_missing(tmp_path):
    squares = work(tmp_path)
    squares.start()
    for shard in (0, 2):
        squares.file(shard).write_text("done\n")
    squares.start()  # again, with the same plan
    seen = []
    run_here(squares, Squares, lambda *progress: seen.append(progress))
    assert seen == [(9, 11), (11, 11)] and squares.file(0).read_text() == squares.file(2).read_text() == "done\n"
    run_here(squares, pytest.fail)  # no worker is made where nothing is missing


def test_other_work(tmp_path):
    work(tmp_path).start()
    for changes, name in (({"plan": {"of": "cubes"}}, "of"), ({"num_items": 12}, "num_items"), ({"plan": {"of": "squares", "n": 1}}, "n")):
        with pytest.raises(ValueError, match=f"squares.jsonl.parts: begun with another {name}; delete the folder to start again"):
            work(tmp_path, **changes).start()
    (tmp_path / "squares.jsonl").write_text("")
    with pytest.raises(ValueError, match="squares.jsonl is there already; delete it to make it again, or name another file"):
        work(tmp_path).start()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray leaves files and sockets to the garbage collector
def test_on_a_cluster_of_two_nodes(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}})
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        squares = work(tmp_path, num_items=40)
        squares.start()
        squares.file(1).write_text('{"item": -1}\n')
        seen = []
        ray.cloudpickle.register_pickle_by_value(__import__(Squares.__module__, fromlist=["Squares"]))
        run_on_ray(squares, functools.partial(Squares), lambda *progress: seen.append(progress), num_workers=2)
        assert len(seen) == 13 and seen[-1] == (40, 40)
        squares.finish(join_lines)
        found = lines(squares.out)
        assert [row["item"] for row in found] == [0, 1, 2, -1, *range(6, 40)]
        assert os.getpid() not in {row.get("by") for row in found}
    finally:
        ray.shutdown()
        cluster.shutdown()
