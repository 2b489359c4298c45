"""Records what the code at hand writes: `python -m tests.compat.record`.

It starts an emulator, plays the scenes of `store_scenes` and `shop_scenes`, and writes what lies in AWS then, read with boto3,
to `tests/compat/{version}`. What is there is not replaced: a released version's corpus is never recorded again.

Ids that a caller can choose are fixed. What is a process's own (its pid, host and paths) is replaced by made-up values.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import celery.app.amqp

from tests.chaos.proxy import Proxy
from tests.compat.corpus import HERE, ROOT, SHOP, STORE, TABLES, Environment, emulator, parts_of, write
from tests.compat.post import Post
from tests.compat.shop_scenes import ShopScenes
from tests.compat.store_scenes import StoreScenes

#: Paths in tracebacks, and what they become.
_PATHS = {str(ROOT): "/app", str(Path(celery.__file__).parents[1]): "/site-packages"}


def main() -> None:
    """Record."""
    target = HERE / version("mdstore")
    target.mkdir()
    celery.app.amqp.anon_nodename = lambda: "gen1@recorder"
    recorded_at = time.time()
    with tempfile.TemporaryDirectory() as directory, emulator() as url, Proxy(url) as proxy:
        store, shop = (Environment(url, namespace, Path(directory)) for namespace in (STORE, SHOP))
        shop.make_fifo()
        posts = {one.namespace: Post(one, proxy) for one in (store, shop)}
        store_scenes = StoreScenes(store, posts[STORE], proxy.url)
        shop_scenes = ShopScenes(shop, posts[SHOP], proxy.url)
        store_scenes.play()
        shop_scenes.play()
        write(target / "about.json", {"recorded_at": int(recorded_at)})
        write(target / "messages.json", {name: _letters(post) for name, post in posts.items()})
        write(target / "broadcasts.json", shop_scenes.broadcasts)
        write(target / "objects.json", {one.namespace: _objects(one) for one in (store, shop)})
        write(target / "items.json", {one.namespace: _items(one) for one in (store, shop)})
    write(target / "requests.json", store_scenes.requests)
    write(
        target / "expected.json",
        {
            **store_scenes.expected,
            "replays": shop_scenes.replays,
            "results": shop_scenes.results,
            "fired": shop_scenes.fired,
            "groups": shop_scenes.groups,
            "delayed": shop_scenes.delayed,
        },
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size:,} bytes")


def _letters(post: Post) -> dict[str, Any]:
    return {
        name: _without_paths({key: value for key, value in asdict(letter).items() if value})
        for name, letter in post.kept.items()
    }


def _objects(environment: Environment) -> dict[str, Any]:
    pages = environment.s3.get_paginator("list_objects_v2").paginate(Bucket=environment.settings.bucket)
    keys = [one["Key"] for page in pages for one in page.get("Contents", [])]
    bodies = (environment.s3.get_object(Bucket=environment.settings.bucket, Key=key)["Body"].read() for key in keys)
    return {key: parts_of(body) for key, body in zip(keys, bodies, strict=True)}


def _items(environment: Environment) -> dict[str, Any]:
    return {table: [_without_paths(item) for item in environment.items(table)] for table in TABLES}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _replaced(value, _PATHS.items()) if isinstance(value, str) else value


def _replaced(text: str, changes: Iterable[tuple[str, str]]) -> str:
    for old, new in changes:
        text = text.replace(old, new)
    return text


if __name__ == "__main__":
    main()
