"""tools/web_demo.py in a real browser, with two small random detectors; its command line."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_training
from hierkd import OpenVocabularyPredictor
from hierkd.inference.detections import as_records
from hierkd.inference.detectors import load_detectors
from tools import web_demo

pytestmark = [
    pytest.mark.filterwarnings("ignore:::gradio"),
    pytest.mark.filterwarnings("ignore:::starlette"),
]

NAMES = ("red box", "cup", "traffic cone")
TIMEOUT = 60_000  # ms; the machine may be busy, and no wait is for a time
CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="the page needs Gradio: the extra `web`")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    executable = next(found, None)
    if executable is None:
        pytest.skip("no Chromium, chromium-browser or google-chrome on the PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, and two trainings' folders with different weights."""
    root = tmp_path_factory.mktemp("web")
    with tiny_training.prepared(root):
        runs = [
            tiny_training.write_run(root / name, root / "clip.pt", "TEST.DETECTIONS_PER_IMAGE", "8")
            for name in ("first", "second")
        ]
        weights = torch.load(runs[1] / "model_final.pth", weights_only=True)
        generator = torch.Generator().manual_seed(1)
        for tensor in weights["model"].values():
            if tensor.dtype == torch.float32 and tensor.dim() > 1:
                tensor += tensor.std() * torch.randn(tensor.shape, generator=generator)
        torch.save(weights, runs[1] / "model_final.pth")
        pictures = sorted((root / "miniature" / "val").glob("*.png"))
        yield SimpleNamespace(root=root, runs=runs, pictures=pictures)


@pytest.fixture(scope="module")
def server(browser, world, tmp_path_factory):
    """The page in this process; counts what the detectors do, and who is called outside."""
    from hierkd.reports.web_page import Limits, build_page

    folder = tmp_path_factory.mktemp("served")
    predictors = load_detectors(str(world.runs[0]), None, compared=[f"another={world.runs[1]}"])
    passes, outside = [], []
    for predictor in predictors.values():
        predictor.model.register_forward_hook(lambda *_: passes.append(1))
    connect = socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            outside.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    limits = Limits(max_bytes=300_000, max_pixels=40_000, max_names=40)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in web_demo.offline(folder).items():
            patch.setenv(name, value)
        patch.setattr(socket.socket, "connect", watched)
        page = build_page(predictors, limits, ", ".join(NAMES), world.pictures[:2])
        url = web_demo.launch(page, "127.0.0.1", 0, limits)
        yield SimpleNamespace(
            url=url,
            build_page=build_page,
            limits=limits,
            passes=passes,
            outside=outside,
            requests=[],
        )
        page.close(verbose=False)


@pytest.fixture(scope="module")
def reference(world):
    """The detectors once more, loaded as a user of the Python interface would."""
    return [OpenVocabularyPredictor.from_checkpoint(run) for run in world.runs]


def eventually(check):
    """Return what ``check`` does once its assertions hold.

    The page takes over an answer piece by piece, and an answer to earlier input may come first.
    """
    until = time.monotonic() + TIMEOUT / 1000
    while True:
        try:
            return check()
        except AssertionError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


class Page:
    """What a visitor does and sees; waits for what should happen."""

    def __init__(self, page, url):
        self.page = page
        page.set_default_timeout(TIMEOUT)
        page.goto(url)
        self.says("1.png, 96 × 96")  # the first example
        self.remove()

    def upload(self, path):
        self.page.set_input_files("#picture input[type=file]", str(path))

    def remove(self):
        self.page.click("#picture button[aria-label='Remove Image']")
        self.says("Drop a picture.")

    def type_names(self, text):
        self.page.fill("#classes textarea", text)
        self.page.press("#classes textarea", "Enter")

    def move_threshold(self, value):
        self.page.fill("#threshold input[type=range]", str(value))

    def set_class_thresholds(self, text):
        field = "#class_thresholds input, #class_thresholds textarea"
        if not self.page.locator(field).first.is_visible():
            self.page.click("#more button")
        self.page.fill(field, text)
        self.page.press(field, "Enter")

    def says(self, text):
        def check():
            said = self.page.locator("#message textarea, #message input").first.input_value()
            assert text in said

        eventually(check)

    def complains(self, text):
        """A message that says so, and nothing of an earlier picture."""
        self.says(text)
        self.page.locator("#results").wait_for(state="hidden", timeout=TIMEOUT)

    def download(self, selector):
        with self.page.expect_download(timeout=TIMEOUT) as caught:
            self.page.locator(selector).first.click()
        return Path(caught.value.path())

    def tells(self, check):
        """The JSON file, once it passes the check."""
        if not self.page.locator("#json .cm-content").is_visible():
            self.page.locator("#json button").first.click()
            self.page.locator("#json .cm-content").wait_for()

        def download():
            told = json.loads(
                self.download("#json [download], #json button[title*=ownload]").read_text()
            )
            check(told)
            return told

        return eventually(download)


@pytest.fixture
def visit(browser, server):
    """Open the page as a new visitor; several in one test know nothing of one another."""
    with contextlib.ExitStack() as open_pages:

        def _visit():
            context = browser.new_context()
            open_pages.callback(context.close)
            context.on("request", lambda request: server.requests.append(request.url))
            return Page(context.new_page(), server.url)

        yield _visit


def test_from_a_picture_to_its_boxes(visit, server, world, reference):
    picture = world.pictures[1]
    page = visit()
    icons = page.page.locator("#icons_only textarea, #icons_only input").first.input_value()
    assert "rendered icons only: first, another." in icons
    page.upload(picture)
    page.says("detections shown")
    page.type_names("cup, <b>dog</b> , red box;zebra")
    page.says("2.png, 96 × 96 pixels, 4 classes.")
    before = len(server.passes)
    page.move_threshold(0)
    page.says("first: 8 of 8 detections shown\nanother: 8 of 8")

    names = ("cup", "<b>dog</b>", "red box", "zebra")
    expected, compared = (each.predict(str(picture), vocabulary=names) for each in reference)
    assert len(set(expected.pred_classes.tolist())) > 1  # or it would prove little
    records = as_records(expected, names)

    def check(told):
        assert (told["vocabulary"], told["confidence_threshold"]) == (list(names), 0)
        assert told["detections"] == records
        assert told["compared"] == {"another": as_records(compared, names)}

    told = page.tells(check)
    assert (told["file_name"], told["height"], told["width"]) == ("2.png", 96, 96)
    assert "dog" in page.page.locator("#table").inner_text()
    assert page.page.locator("#results b").count() == 0  # names are text, not HTML
    with Image.open(page.download("#panel_0 [aria-label*=ownload]")) as panel:
        assert (panel.format, panel.size) == ("PNG", (640, 640))

    # The threshold of all, and of one class, moves without a detector.
    page.move_threshold(1)
    page.says("first: 0 of 8")
    page.set_class_thresholds(f"{records[0]['class']}=0")
    count = sum(record["class"] == records[0]["class"] for record in records)
    page.says(f"first: {count} of 8")
    assert len(server.passes) == before
    page.set_class_thresholds("horse=0.5")
    page.complains("horse")


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_the_result_is_seen_at_once_and_by_keyboard_alone(browser, server, width, height):
    with contextlib.closing(browser.new_context(viewport={"width": width, "height": height})) as c:
        page = c.new_page()
        page.goto(server.url)
        panel = page.locator("#panel_0 img")
        panel.wait_for(timeout=TIMEOUT)
        assert page.evaluate("scrollY") == 0
        eventually(lambda: bottom_is_above(panel, height))
        page.get_by_role("button", name="Example 2.png").press("Enter")
        message = page.locator("#message textarea, #message input").first
        page.wait_for_function(
            "document.querySelector('#message textarea, #message input').value.includes('2.png')"
        )
        eventually(lambda: bottom_is_above(message, height))
        slider = page.locator("#threshold input[type=range]")
        slider.press("End")
        assert slider.evaluate("e => getComputedStyle(e).outlineWidth") == "3px"


def bottom_is_above(locator, height):
    box = locator.bounding_box()
    assert 0 <= box["y"] < box["y"] + box["height"] <= height


def test_what_is_wrong_is_said_and_the_old_answer_goes(visit, server, world, tmp_path):
    good = world.pictures[2]
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "many_pixels.jpg", quality=50)
    (tmp_path / "nonsense.jpg").write_bytes(b"no picture at all")
    (tmp_path / "many_bytes.png").write_bytes(good.read_bytes() + bytes(server.limits.max_bytes))

    page = visit()
    page.upload(good)
    page.says("3.png, 96 × 96")
    page.remove()
    page.page.locator("#results").wait_for(state="hidden")
    before = len(server.passes)
    for name, complaint in (
        ("nonsense.jpg", "not a picture"),
        ("many_pixels.jpg", "at most 40000"),
    ):
        page.upload(tmp_path / name)
        page.complains(complaint)
        page.remove()
    page.upload(tmp_path / "many_bytes.png")
    toast = page.page.locator("[data-testid=toast-body]", has_text="maximum allowed size")
    toast.first.wait_for()
    assert len(server.passes) == before
    page.upload(good)
    page.says("3.png, 96 × 96 pixels, 3 classes.")
    page.type_names("cup, Cup")
    page.complains("'cup' and 'Cup'")


def test_visitors_do_not_mix_and_nothing_leaves_this_machine(visit, server, world, reference):
    pages, names = [visit(), visit()], [("cup", "dog"), ("zebra",)]
    for page, chosen in zip(pages, names, strict=True):
        page.page.fill("#classes textarea", ", ".join(chosen))
    transfer = pages[0].page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(
                new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            return transfer;
        }""",
        list(world.pictures[0].read_bytes()),
    )
    pages[0].page.dispatch_event(
        "#picture button:has(input[type=file])", "drop", {"dataTransfer": transfer}
    )
    pages[1].page.locator(".gallery-item img").nth(1).click()  # while the first may be at work
    for page, file_name, count in zip(pages, ("dropped.png", "2.png"), (2, 1), strict=True):
        page.says(f"{file_name}, 96 × 96 pixels, {count} class")
    for page, chosen, picture in zip(pages, names, world.pictures, strict=False):
        page.move_threshold(0)
        page.says("first: 8 of 8")
        expected = as_records(reference[0].predict(str(picture), vocabulary=chosen), chosen)

        def check(told, expected=expected):
            assert told["detections"] == expected

        page.tells(check)
    hosts = {urlsplit(url).hostname for url in server.requests if not url.startswith("data:")}
    assert hosts - {None} == {"127.0.0.1"}  # None: blob:
    assert server.outside == []


def request(url, body=None, **headers):
    """Ask the server -> its status."""
    asked = urllib.request.Request(url, data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_hands_out_and_fetches_nothing_else(server, world):
    api = server.url.rstrip("/") + "/gradio_api"
    for path in (
        "/file=http://192.0.2.1/a.png",
        "/file=%68ttp://192.0.2.1/a.png",
        "/proxy=http://192.0.2.1/",
        f"/file={world.runs[0] / 'config.yaml'}",
    ):
        assert request(api + path) == 403, path
    port = urlsplit(server.url).port
    as_json = {"Content-Type": "application/json"}
    file = {"path": "http://192.0.2.1/a.png", "meta": {"_type": "gradio.FileData"}}
    call = {"data": [file, "cup", 0, 10, ""], "fn_index": 0, "session_hash": "s"}
    assert request(f"{api}/queue/join", json.dumps(call).encode(), **as_json) == 403
    assert request(f"{api}/queue/join", b"{", **as_json) == 400
    endless = http.client.HTTPConnection("127.0.0.1", port)
    endless.putrequest("POST", "/gradio_api/queue/join")
    endless.putheader("Content-Length", str(web_demo.MAX_REQUEST_BYTES + 1))
    endless.endheaders()
    assert endless.getresponse().status == 413
    endless.close()
    assert server.outside == []
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}"):
        web_demo.launch(server.build_page({}, server.limits), "127.0.0.1", port, server.limits)


def test_nothing_is_left_behind(world, tmp_path):
    """The command itself, in an empty home, with a folder for temporary files of its own."""
    pytest.importorskip("gradio", reason="the page needs Gradio: the extra `web`")
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    root = Path(__file__).resolve().parent.parent
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("GRADIO", "XDG", "HIERKD"))},
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "DETECTRON2_DATASETS": str(world.root),
        "MPLCONFIGDIR": str(world.root / "matplotlib"),  # its list of fonts, for any program
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(root / "projects" / "HierKD"),
    }
    command = [sys.executable, str(root / "tools" / "web_demo.py"), "--run", str(world.runs[0])]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", "--examples", str(world.pictures[0])],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=home,
    )
    watchdog = threading.Timer(TIMEOUT / 1000 * 2, process.kill)
    watchdog.start()
    try:
        said = list(iter_until(process.stdout, "Open http://127.0.0.1:"))
        assert request(said[-1].partition("Open ")[2].split()[0]) == 200
        (folder,) = temporary.iterdir()
        assert folder.name.startswith("hierkd_web_")
        assert len(list(folder.rglob("*"))) > 1
        process.terminate()
        said.append(process.stdout.read())
        assert process.wait(timeout=TIMEOUT / 1000) == 0, "".join(said)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    assert list(temporary.iterdir()) == []
    assert list(home.iterdir()) == []
    assert "Traceback" not in "".join(said)


def iter_until(lines, text):
    for line in lines:
        yield line
        if text in line:
            return


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run", "gone"], "gone"),
        (["--port", "70000"], "--port"),
        (["--max-megabytes", "0"], "--max-megabytes"),
    ],
)
def test_wrong_options(capsys, monkeypatch, tmp_path, arguments, named):
    pytest.importorskip("gradio", reason="the page needs Gradio: the extra `web`")
    monkeypatch.chdir(tmp_path)
    for name in web_demo.offline(tmp_path):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # main sets them for good
    with pytest.raises(SystemExit) as stopped:
        web_demo.main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_without_gradio_the_message_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(web_demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        web_demo.main([])
    assert stopped.value.code == 2
    assert "pip install" in capsys.readouterr().err
