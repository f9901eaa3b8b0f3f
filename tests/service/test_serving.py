"""Over HTTP: answers equal to the command's, refusals, limits, and what one client can do to the others."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")

from serving import PATIENCE, Client, form, planted_detector, png, poison, seen_images, served, until

import fastmrcnn.predict as command
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.detection.detector import Detector
from fastmrcnn.errors import UserError


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, CocoDataset]:
    return planted_detector(tmp_path_factory.mktemp("planted") / "data")


@pytest.fixture(scope="module")
def client(planted: tuple[Detector, CocoDataset]) -> Iterator[Client]:
    with served(planted[0], batch=4, max_bytes=200_000, max_pixels=10_000) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> tuple[Detector, CocoDataset]:
    """A detector that no other test has in hand."""
    return planted_detector(tmp_path / "data")


def images(dataset: CocoDataset) -> dict[int, bytes]:
    return {record.image_id: record.path.read_bytes() for record in dataset.records}


def expected(detector: Detector, path: Path, score: float, image_id: int = 1) -> list[dict[str, Any]]:
    """As the command `predict` writes it, without its files."""
    task = command.Task(path, path, image_id, None)
    pixels, _ = command.read_task(task, None, detector.reading)
    entries = command.as_entries(detector.detect(pixels, score), task, detector, detector.card.category_ids)
    entries = [{k: v for k, v in entry.items() if k not in ("file_name", "overlay")} for entry in entries]
    return json.loads(json.dumps(entries))


def test_what_predict_finds(client: Client, planted: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = planted
    for record in dataset.records:
        content = record.path.read_bytes()
        for body, kind in ((content, "image/png"), (content, "application/octet-stream"), form(content)):
            answer = client.predict(body, kind, score=0.6, image_id=record.image_id)
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/json"
            found = answer.json()
            size = {"id": record.image_id, "width": record.width, "height": record.height}
            assert found["image"] == size
            assert found["results"] == expected(detector, record.path, 0.6, record.image_id)
            assert found["notes"] == []
    assert len(expected(detector, dataset.records[0].path, 0.6)) == 2


def test_masks_as_they_are_wanted(client: Client, planted: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = planted
    path = dataset.records[0].path
    whole = expected(detector, path, 0.5)
    none = client.predict(path.read_bytes(), masks="none").json()["results"]
    assert none == [{k: v for k, v in entry.items() if k != "segmentation"} for entry in whole]
    polygons = client.predict(path.read_bytes(), masks="polygon").json()["results"]
    assert len(polygons) == len(whole) == 3
    for entry, other in zip(polygons, whole, strict=True):
        height, width = other["segmentation"]["size"]
        again = coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], height, width))
        np.testing.assert_array_equal(coco_mask.decode(again), coco_mask.decode(other["segmentation"]))


def test_files_are_read_as_predict_reads_them(
    client: Client, planted: tuple[Detector, CocoDataset], tmp_path: Path
) -> None:
    detector, _ = planted
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((60, 92), 110 * 257, np.uint16)).save(deep)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (92, 60), (50, 50, 50)).save(turned, exif=exif, quality=100)
    for path in (deep, turned):
        answer = client.predict(path.read_bytes()).json()
        assert answer["results"] == expected(detector, path, 0.5)
        assert len(answer["results"]) == 3
    assert (answer["image"]["width"], answer["image"]["height"]) == (60, 92)
    dark = tmp_path / "dark.png"
    Image.fromarray(np.full((60, 92), 20 * 257, np.uint16)).save(dark)
    assert "small, dark part" in client.predict(dark.read_bytes()).json()["notes"][0]


def damaged(kind: str) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, kind)
    content = stream.getvalue()
    return content[: len(content) // 2]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
WIDE = png(np.zeros((101, 100, 3), np.uint8))


@pytest.mark.parametrize(
    ("body", "kind", "status", "word"),
    [
        (b"", "image/png", 400, "no bytes"),
        (damaged("PNG"), "image/png", 400, "cannot be decoded"),
        (damaged("JPEG"), "image/jpeg", 400, "cannot be decoded"),
        (b"just text", "image/png", 415, "no image"),
        (EPS, "image/x-eps", 415, "no image"),
        (b"{}", "application/json", 415, "Content-Type 'application/json'"),
        (b"{}", "", 415, "Content-Type"),
        (WIDE, "image/png", 413, "more than the 10,000 pixels"),
        (b"x" * 200_001, "image/png", 413, "more than the 200,000 bytes"),
        (*form(b"x", field="image"), 400, "'image'"),
        (*form(b""), 400, "no bytes"),
        (form(WIDE)[0][:150], "multipart/form-data; boundary=xyz", 400, "cut short"),
        (b"no form", "multipart/form-data; boundary=xyz", 400, "form"),
        (b"no form", "multipart/form-data", 400, "boundary"),
        (
            *form(b"x", more=b'--xyz\r\nContent-Disposition: form-data; name="score"\r\n\r\n0.5\r\n'),
            400,
            "'file', 'score'",
        ),
    ],
)
def test_what_is_no_image(client: Client, body: bytes, kind: str, status: int, word: str) -> None:
    before = client.metric(f'fastmrcnn_requests_total{{path="/predict",status="{status}"}}')
    answer = client.predict(body, kind)
    assert answer.status == status
    check_error(answer.body, word)
    assert client.metric(f'fastmrcnn_requests_total{{path="/predict",status="{status}"}}') == before + 1


def check_error(body: bytes, word: str) -> None:
    told = json.loads(body)
    assert list(told) == ["error"]
    assert word in told["error"]
    assert "\n" not in told["error"]
    assert not re.search(r"Traceback|0x[0-9a-f]+|/home|\.py\b|BytesIO|uvicorn|Pillow", told["error"])


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("GET", "/predict", 405, "GET '/predict'"),
        ("DELETE", "/health", 405, "DELETE"),
        ("GET", "/", 404, "no such path"),
        ("POST", "/predict/", 404, "no such path"),
        ("POST", "/predict?score=2", 422, "'score'"),
        ("POST", "/predict?score=nan", 422, "'score'"),
        ("POST", "/predict?score=", 422, "'score'"),
        ("POST", "/predict?masks=png", 422, "'rle', 'polygon' or 'none'"),
        ("POST", "/predict?image_id=-1", 422, "'image_id'"),
        ("POST", "/predict?scor=1", 422, "score, masks, image_id are known"),
    ],
)
def test_what_is_no_request_of_ours(client: Client, method: str, path: str, status: int, word: str) -> None:
    answer = client.ask(
        method, path, b"x" * 500_000 if method == "POST" else None, {"Content-Type": "image/png"}
    )
    assert answer.status == status
    check_error(answer.body, word)
    assert ("allow" in answer.headers) == (status == 405)
    assert "server" not in answer.headers


def test_mutated_files_harm_nothing(client: Client, planted: tuple[Detector, CocoDataset]) -> None:
    draw = np.random.default_rng(5)
    statuses = set()
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        stream = io.BytesIO()
        Image.new("RGB", (40, 30), (110, 110, 110)).save(stream, kind)
        for _ in range(12):
            content = bytearray(stream.getvalue())
            for place in draw.integers(0, len(content), 4):
                content[place] = draw.integers(0, 256)
            answer = client.predict(bytes(content))
            statuses.add(answer.status)
            if answer.status == 500:  # a grey that the planted model does not know
                assert answer.json() == {"error": "the model failed on this image"}
            elif answer.status != 200:
                check_error(answer.body, "")
    assert statuses <= {200, 400, 413, 415, 500}
    assert client.predict(planted[1].records[0].path.read_bytes()).status == 200


def test_a_body_without_end_is_read_up_to_the_limit(client: Client) -> None:
    """Chunks without Content-Length: the answer comes, and then the connection is closed."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        began, chunk = time.monotonic(), b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < PATIENCE:
                connection.sendall(chunk)
        assert time.monotonic() - began < PATIENCE / 2
    assert client.metric('fastmrcnn_requests_total{path="/predict",status="413"}') > 0
    answer = client.ask(
        "POST", "/predict", iter([b"x" * 150_000, b"x" * 150_000]), {"Content-Type": "image/png"}
    )
    assert answer.status == 413
    check_error(answer.body, "more than the 200,000 bytes")


def test_the_document_and_a_page_that_loads_nothing(client: Client) -> None:
    document = client.ask("GET", "/openapi.json").json()
    assert set(document["paths"]) == {"/predict", "/health", "/metrics"}
    assert "multipart/form-data" in document["paths"]["/predict"]["post"]["requestBody"]["content"]
    page = client.ask("GET", "/docs").body.decode()
    assert not re.search(r"<script|https?://|@import|src=", page)
    for word in ("image_id", "200,000 bytes", "10,000 pixels", "/metrics", "503"):
        assert word in page


def test_images_of_one_shape_go_together(own: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = own
    known = images(dataset)
    with served(detector, batch=3, max_delay=0.0) as client, ThreadPoolExecutor(12) as pool:
        model = client.model
        model.hold()
        first = pool.submit(client.predict, known[2])
        assert model.begun.wait(20)
        order = [11, 11, 5, 11, 11, 5, 8]
        answers = [pool.submit(client.predict, known[image], image_id=image) for image in order]
        until(lambda: client.metric("fastmrcnn_queue_length") == len(order))
        model.seen.clear()
        model.free.set()
        assert first.result().json()["results"] == []
        for image, answer in zip(order, answers, strict=True):
            path = next(record.path for record in dataset.records if record.image_id == image)
            assert answer.result().json()["results"] == expected(detector, path, 0.5, image)
        shapes = {11: (3, 96, 128), 5: (3, 160, 64), 8: (3, 96, 96)}
        batches = sorted(shape for shape in list(model.seen) if shape[0] > 1)
        assert batches == [(2, *shapes[5]), (3, *shapes[11])]
        assert client.metric('fastmrcnn_batch_images_bucket{le="4.0"}') == client.metric(
            "fastmrcnn_batch_images_count"
        )
        assert client.metric("fastmrcnn_images_total") == 1 + len(order)


def test_an_error_of_the_model_is_of_one_image(
    own: tuple[Detector, CocoDataset], caplog: pytest.LogCaptureFixture
) -> None:
    detector, dataset = own
    good = images(dataset)[8]
    with served(detector, batch=4) as client, ThreadPoolExecutor(4) as pool:
        client.model.hold()
        first = pool.submit(client.predict, good)
        assert client.model.begun.wait(20)
        answers = [pool.submit(client.predict, body) for body in (good, poison(), good)]
        until(lambda: client.metric("fastmrcnn_queue_length") == 3)
        client.model.free.set()
        assert [answer.result().status for answer in (first, *answers)] == [200, 200, 500, 200]
        assert answers[1].result().json() == {"error": "the model failed on this image"}
        assert "planted: a path" in caplog.text  # for whoever runs the service
        assert client.predict(good).json() == answers[0].result().json()
        assert client.metric("fastmrcnn_model_errors_total") == 1
        assert client.ask("GET", "/health").status == 200


def test_an_error_of_our_own(own: tuple[Detector, CocoDataset], monkeypatch: pytest.MonkeyPatch) -> None:
    detector, dataset = own
    image = images(dataset)[8]

    async def fail(*arguments: Any) -> bytes:
        raise RuntimeError("planted: in /home/someone/service.py")

    with served(detector) as client:
        with monkeypatch.context() as patch:
            patch.setattr(client.service, "predict", fail)
            answer = client.predict(image)
            assert answer.status == 500
            check_error(answer.body, "the service failed on this request")
        assert client.predict(image).status == 200
        assert client.metric('fastmrcnn_requests_total{path="/predict",status="500"}') == 1


def test_when_all_places_are_taken(own: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = own
    image = images(dataset)[8]
    with served(detector, batch=1, queue=2) as client, ThreadPoolExecutor(3) as pool:
        client.model.hold()
        taken = [pool.submit(client.predict, image) for _ in range(2)]
        until(lambda: client.service.in_hand == 2)
        refused = client.predict(image)
        assert refused.status == 503
        check_error(refused.body, "all 2 places are taken")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        client.model.free.set()
        assert [answer.result().status for answer in taken] == [200, 200]
        assert client.predict(image).status == 200


def test_when_time_is_over(own: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = own
    image = images(dataset)[8]
    with served(detector, batch=1, timeout=1.0) as client, ThreadPoolExecutor(2) as pool:
        client.model.hold()
        late = [pool.submit(client.predict, image) for _ in range(2)]
        assert [answer.result().status for answer in late] == [504, 504]
        check_error(late[0].result().body, "within 1 s")
        until(lambda: client.ask("GET", "/health").status == 503)  # the model does not answer
        before = seen_images(client.model)
        client.model.free.set()
        until(lambda: client.ask("GET", "/health").status == 200)
        assert client.predict(image).status == 200
        assert seen_images(client.model) - before == 2  # the second late one was not begun
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as slow:
            slow.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n"
            )
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_who_hangs_up_is_dropped(own: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = own
    image = images(dataset)[8]
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}"
    with served(detector, batch=1) as client, ThreadPoolExecutor(1) as pool:
        client.model.hold()
        first = pool.submit(client.predict, image)
        assert client.model.begun.wait(20)
        before = seen_images(client.model)
        gone = socket.create_connection(("127.0.0.1", client.port))
        gone.sendall(head.encode() + b"\r\n\r\n" + image)
        until(lambda: client.metric("fastmrcnn_queue_length") == 1)
        gone.close()
        until(lambda: client.metric("fastmrcnn_queue_length") == 0)
        half = socket.create_connection(("127.0.0.1", client.port))
        half.sendall(head.encode() + b"\r\n\r\n" + image[:20])
        until(lambda: client.service.in_hand == 2)
        half.close()
        until(lambda: client.service.in_hand == 1)
        client.model.free.set()
        assert first.result().status == 200
        assert client.metric('fastmrcnn_requests_total{path="/predict",status="499"}') == 2
        assert seen_images(client.model) == before + 1


def test_what_is_begun_is_finished_and_new_is_refused(own: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = own
    image = images(dataset)[8]
    with served(detector, batch=1) as client, ThreadPoolExecutor(1) as pool:
        client.model.hold()
        begun = pool.submit(client.predict, image)
        assert client.model.begun.wait(20)
        client.stop()
        refused = client.predict(image)
        assert refused.status == 503
        check_error(refused.body, "stopping")
        assert client.ask("GET", "/health").status == 503
        client.model.free.set()
        assert begun.result().status == 200


def test_not_ready_before_the_model_is_warm(own: tuple[Detector, CocoDataset]) -> None:
    detector, dataset = own
    detector.model.hold()  # type: ignore[operator]
    with served(detector, ready=False) as client:
        assert client.model.begun.wait(20)
        for answer in (client.ask("GET", "/health"), client.predict(images(dataset)[8])):
            assert answer.status == 503
            check_error(answer.body, "warmed up")
        client.model.free.set()
        until(lambda: client.ask("GET", "/health").status == 200)
        assert client.ask("GET", "/health").json() == {"status": "ready", "classes": dataset.class_names}


def test_a_model_that_fails_in_its_warm_up_ends_the_service(own: tuple[Detector, CocoDataset]) -> None:
    detector, _ = own
    del detector.model.records[13]  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match="cannot be run"), served(detector):
        pass


@pytest.mark.slow
def test_a_thousand_requests_lose_none(own: tuple[Detector, CocoDataset]) -> None:
    """Of 16 clients, a tenth of them malformed: each gets its own answer."""
    detector, dataset = own
    paths = {record.image_id: record.path for record in dataset.records}
    known = images(dataset)
    wanted = {
        (image, score): expected(detector, paths[image], score) for image in known for score in (0.5, 0.7)
    }
    bad = [
        (damaged("PNG"), "image/png", 400),
        (damaged("JPEG"), "image/jpeg", 400),
        (b"", "image/png", 400),
        (b"just text", "image/png", 415),
        (b"x" * 300_000, "image/png", 413),
        (WIDE, "image/png", 413),
        (*form(b"x", field="image"), 400),
        (poison(), "image/png", 500),
    ]
    draw = np.random.default_rng(11)
    lost = threading.Event()

    def one(number: int) -> tuple[int, int]:
        if number % 10 == 0:
            body, kind, status = bad[number // 10 % len(bad)]
            answer = client.predict(body, kind)
            check_error(answer.body, "")
            return status, answer.status
        image, score, as_form = choices[number]
        body, kind = form(known[image]) if as_form else (known[image], "image/png")
        answer = client.predict(body, kind, score=score)
        if answer.status == 200 and answer.json()["results"] != wanted[image, score]:
            lost.set()
        return 200, answer.status

    choices = [
        (int(draw.choice(list(known))), float(draw.choice([0.5, 0.7])), bool(draw.integers(2)))
        for _ in range(1000)
    ]
    with (
        served(detector, batch=8, max_bytes=200_000, max_pixels=10_000) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        statuses = list(pool.map(one, range(1000)))
        assert [got for _, got in statuses] == [wish for wish, _ in statuses]
        assert not lost.is_set()
        assert client.metric('fastmrcnn_requests_total{path="/predict"') == 1000
        assert client.metric("fastmrcnn_images_total") == 900
        assert client.metric("fastmrcnn_requests_in_hand") == 0
        assert max(shape[0] for shape in client.model.seen) > 1
