"""The preparation of many videos on a Ray cluster; the files are those of one machine.

All machines must see the collection's folders under the same paths, and have this package.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sgm.data.collection import Collection
from sgm.data.preparing import Outcome


def prepare_on_ray(collection: Collection, names: Sequence[str], address: str) -> Iterator[Outcome]:
    """Prepare videos by Ray Data; give what became of each as they are finished.

    Args:
        collection: whose folders are absolute.
        names: of the videos.
        address: of the cluster, as ``ray.init`` takes it: ``auto``, ``local``, ``HOST:PORT``.

    Raises:
        ValueError: Ray is not installed, or there is no cluster.
        OSError: something cannot be written.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--ray needs Ray, which is not installed: pip install 'ray[data]'"
        ) from error
    try:
        ray.init(address, ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--ray {address}: {str(error).splitlines()[0]}") from error

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        collection.prepare(row["item"])
        return row

    for row in ray.data.from_items(list(names)).map(prepare).iter_rows():
        yield collection.prepare(row["item"])  # it is done: what became of it is read
