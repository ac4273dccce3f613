"""Run by test_ray.py: two nodes, a replica on each, one of them killed under load. Prints what happened as JSON on the last line.

python tests/server/ray_cluster.py MODEL_FOLDER PORT
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from omnimamba.server.ray import Options, application

NUM_CLIENTS = 12
SECONDS = 120


def replicas() -> set[str]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return {entry["name"] for entry in names if entry["name"].startswith("SERVE_REPLICA::")}


async def wait_for(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.2)


async def main(model: str, port: int) -> dict:
    body = {"model": Path(model).name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    good, failed, nodes = [], [], []
    is_over = asyncio.Event()

    async def client(http: httpx.AsyncClient) -> None:
        while not is_over.is_set():
            try:
                response = await http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                failed.append(type(error).__name__)
                continue
            if response.status_code == 200:
                good.append((time.monotonic(), response.json()["choices"][0]["message"]["content"]))
            else:
                failed.append(response.status_code)

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        await wait_for(lambda: len(replicas()) == 2)
        before = replicas()
        nodes = sorted({node["NodeID"] for node in ray.nodes() if node["Alive"]})
        clients = [asyncio.create_task(client(http)) for _ in range(NUM_CLIENTS)]
        await wait_for(lambda: len(good) >= 20)
        killed = sorted(before)[0]
        ray.kill(ray.get_actor(killed, namespace="serve"))
        killed_at, num_before = time.monotonic(), len(good)
        await wait_for(lambda: len(good) >= num_before + 40)
        await wait_for(lambda: len(replicas() - {killed}) == 2)
        num_restored = len(good)
        await wait_for(lambda: len(good) >= num_restored + 20)
        is_over.set()
        await asyncio.gather(*clients)
        stream = {**body, "stream": True}
        async with http.stream("POST", "/v1/chat/completions", json=stream) as response:
            events = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        wrong = await http.get("/v1/nothing")
    return {
        "nodes": len(nodes),
        "answers": len({text for _, text in good}),
        "good": len(good),
        "failed": failed,
        "first good after": round(min(at for at, _ in good if at > killed_at) - killed_at, 2),
        "events": len(events),
        "wrong": [wrong.status_code, sorted(wrong.json()["error"])],
    }


if __name__ == "__main__":
    folder, http_port = sys.argv[1], int(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="WARNING")
    serve.start(http_options={"host": "127.0.0.1", "port": http_port})
    options = Options(model=folder, device="cpu", num_slots=8, min_replicas=2, max_replicas=2, num_cpus=0.6)
    serve.run(application(options), name="omnimamba")
    found = asyncio.run(main(folder, http_port))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))
