"""tools/web_demo.py in a real browser, with two small random detectors; its command line."""

import contextlib
import io
import json
import os
import shutil
import signal
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
from hierkd.miniature.world import MINIATURE_CLASSES
from hierkd.reports.drawing import class_color
from hierkd.reports.web_page import Limits
from tools import web_demo

pytestmark = [
    pytest.mark.filterwarnings("ignore:::gradio"),
    pytest.mark.filterwarnings("ignore:::starlette"),
]

NAMES = ("red box", "cup", "traffic cone")
LIMITS = Limits(max_bytes=300_000, max_pixels=40_000, max_names=40)
TIMEOUT = 60_000  # ms; the machine may be busy, and no wait is for a time
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
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
    tiny_training.write_world(root)
    clip = tiny_training.write_clip(root / "clip.pt")
    with pytest.MonkeyPatch.context() as patch, tiny_training.miniature_at(root):
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        patch.setenv("DETECTRON2_DATASETS", str(root))
        runs = [
            tiny_training.write_run(root / name, clip, "TEST.DETECTIONS_PER_IMAGE", "8")
            for name in ("first", "second")
        ]
        weights = torch.load(runs[1] / "model_final.pth", weights_only=True)
        generator = torch.Generator().manual_seed(1)
        for tensor in weights["model"].values():
            if tensor.dtype == torch.float32 and tensor.dim() > 1:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor += tensor.std() * noise
        torch.save(weights, runs[1] / "model_final.pth")
        yield SimpleNamespace(
            root=root,
            runs=runs,
            pictures=sorted((root / "miniature" / "val").glob("*.png")),
        )


@pytest.fixture(scope="module")
def server(browser, world, tmp_path_factory):
    """The page in this process, loaded as its command line does; counts what the detectors do."""
    folder = tmp_path_factory.mktemp("served")
    args = web_demo.get_parser().parse_args(
        ["--run", str(world.runs[0]), "--compare", f"another={world.runs[1]}"]
    )
    predictors = web_demo.load_detectors(args, folder / "text")
    passes, outside, answers = [], [], []
    for predictor in predictors.values():
        predictor.model.register_forward_hook(lambda *_: passes.append(1))
    connect = socket.socket.connect

    def watched(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            outside.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    show = web_demo.Handlers.show

    def recorded(*values):
        answer = show(*values)
        if answer is not None:  # the page was not what it should be already
            answers.append(answer)
        return answer

    served = folder / "gradio"
    served.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setattr(web_demo.Handlers, "show", recorded)
        with web_demo.serving(
            predictors,
            served,
            names=", ".join(NAMES),
            examples=world.pictures[:2],
            port=0,
            limits=LIMITS,
        ) as url:
            yield SimpleNamespace(
                url=url,
                folder=served,
                predictors=predictors,
                passes=passes,
                answers=answers,
                outside=outside,
                requests=[],
            )


@pytest.fixture(scope="module")
def reference(world):
    """The first detector once more, loaded as a user of the Python interface would."""
    return OpenVocabularyPredictor.from_checkpoint(world.runs[0])


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
        self.says("Drop a picture.")

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

    def open_more(self):
        """Unfold the other settings, and let them settle: they are made only now."""
        self.page.click("#more button")
        self.page.locator("#top_k input[type=range]").wait_for()
        self.page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() =>"
            " setTimeout(done))))"
        )

    def says(self, text):
        message = self.page.locator("#message .message", has_text=text)
        try:
            message.wait_for(timeout=TIMEOUT)
        except Exception as error:
            found = self.page.locator("#message").inner_text()
            raise AssertionError(f"expected the message {text!r}, found {found!r}") from error
        return message.inner_text()

    def complains(self, text):
        """A message that says so, and nothing of an earlier picture."""
        self.page.locator("#message .error", has_text=text).wait_for(timeout=TIMEOUT)
        self.page.locator("#results").wait_for(state="hidden", timeout=TIMEOUT)

    def rows(self, number=0):
        table = self.page.locator(f"#table_{number} tbody tr")
        return [tuple(row.split("\t")) for row in table.all_inner_texts()]

    def lists(self, instances, names, number=0):
        """The table shows these detections."""
        expected = expected_rows(instances, names)

        def check():
            assert self.rows(number) == expected

        eventually(check)

    def download(self, kind):
        with self.page.expect_download(timeout=TIMEOUT) as caught:
            self.page.click(f"#{kind}")
        return caught.value.suggested_filename, Path(caught.value.path()).read_bytes()

    def download_json(self, names, threshold):
        """The file's name and content, once the button has what belongs to these settings."""

        def check():
            file_name, content = self.download("json")
            told = json.loads(content)
            assert (told["vocabulary"], told["confidence_threshold"]) == (list(names), threshold)
            return file_name, told

        return eventually(check)

    def panel(self, number):
        source = self.page.get_attribute(f"#panel_{number} img", "src")
        return np.array(Image.open(io.BytesIO(self.page.request.get(source).body())))


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


def expected_rows(instances, names):
    """The table's rows: class, score in percent, box in whole pixels."""
    return [
        (
            record["class"],
            f"{record['score']:.1%}",
            ", ".join(f"{value:.0f}" for value in record["box_xyxy"]),
        )
        for record in as_records(instances, names)
    ]


def test_from_a_picture_to_its_boxes(visit, server, world, reference):
    picture = world.pictures[1]
    page = visit()
    icons = page.page.locator("#icons_only").inner_text()  # the runs' DATASETS.TRAIN
    assert "rendered icons only: first, another." in icons
    page.upload(picture)
    page.says("Detections shown")
    page.type_names("cup,\ndog , red box, zebra")
    page.says("2.png, 96 × 96 pixels, 4 classes.")
    page.move_threshold(0)
    page.says("first: 8 of 8, another: 8 of 8")

    names = ("cup", "dog", "red box", "zebra")
    expected = reference.predict(str(picture), vocabulary=names)
    assert len({row[0] for row in expected_rows(expected, names)}) > 1  # or it would prove little
    page.lists(expected, names)
    other = OpenVocabularyPredictor.from_checkpoint(world.runs[1])
    compared = other.predict(str(picture), vocabulary=names)
    assert expected_rows(compared, names) != expected_rows(expected, names)
    page.lists(compared, names, number=1)
    assert page.page.locator(".detector h3").all_inner_texts() == ["first", "another"]

    file_name, told = page.download_json(names, threshold=0)
    assert file_name == "2_detections.json"
    assert told["detections"] == as_records(expected, names)
    assert told["compared"] == {"another": as_records(compared, names)}
    assert (told["file_name"], told["height"], told["width"]) == ("2.png", 96, 96)

    # One box alone: its edges have the colour of its class, on the page and in the PNG.
    page.open_more()
    page.page.fill("#top_k input[type=range]", "1")
    page.says("first: 1 of 8, another: 1 of 8")
    page.lists(expected[:1], names)
    color = 255 * np.array(class_color(int(expected.pred_classes[0])))
    x0, y0, x1, y1 = (round(float(v) * 640 / 96) for v in expected.pred_boxes.tensor[0])

    def check():
        file_name, content = page.download("png")
        assert file_name == "2_detections.png"
        sheet = np.array(Image.open(io.BytesIO(content)))
        panel = page.panel(0)
        assert panel.shape == (640, 640, 3)
        for x in (x0, x1):
            strip = panel[y0 + 40 : y1 - 40, max(x - 4, 0) : x + 5]
            distance = np.abs(strip - color).max(axis=2).min(axis=1)
            assert np.median(distance) < 60, (x, distance)  # WebP blurs colours
        gap = np.abs(sheet[50:690, 14:654].astype(int) - panel).mean()
        assert gap < 6
        assert sheet.shape[1] > 2 * 640

    eventually(check)


def test_the_threshold_moves_without_a_detector(visit, server, world, reference):
    page = visit()
    page.upload(world.pictures[0])
    page.says("1.png, 96 × 96 pixels, 3 classes")
    before = len(server.passes)
    scores = reference.predict(str(world.pictures[0]), vocabulary=NAMES).scores.tolist()
    counts = []
    for threshold in (0, round(scores[3] + 0.005, 2), 1, 0):
        count = sum(score >= threshold for score in scores)
        page.move_threshold(threshold)
        page.says(f"first: {count} of 8")
        counts.append(count)
    assert len(set(counts)) == 3  # all, some and none
    page.open_more()
    page.page.fill("#class_thresholds input, #class_thresholds textarea", "cup=0, red box=1")
    page.page.press("#class_thresholds input, #class_thresholds textarea", "Enter")
    page.page.wait_for_function(
        "![...document.querySelectorAll('#table_0 tbody tr')].some("
        "row => row.innerText.includes('red box'))"
    )
    assert len(server.passes) == before
    page.page.click("#detect")
    page.page.fill("#class_thresholds input, #class_thresholds textarea", "zebra=0.5")
    page.page.press("#class_thresholds input, #class_thresholds textarea", "Enter")
    page.complains("not in the vocabulary: ['zebra']")

    def check():
        assert len(server.passes) == before + 2  # one of each detector

    eventually(check)


def test_what_is_wrong_is_said_and_the_old_answer_goes(visit, server, world, reference, tmp_path):
    good = world.pictures[2]
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((300, 300)).save(tmp_path / "many_pixels.jpg")
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "nonsense.jpg").write_bytes(b"no picture at all")
    (tmp_path / "many_bytes.png").write_bytes(good.read_bytes() + bytes(LIMITS.max_bytes))
    (tmp_path / "notes.txt").write_text("text")

    page = visit()
    page.upload(good)
    page.says("3.png, 96 × 96")
    page.remove()
    page.page.locator("#results").wait_for(state="hidden")
    before = len(server.passes)
    for name, complaint in (
        ("broken.png", "The picture is broken"),
        ("nonsense.jpg", "not a picture that can be read: expected JPEG"),
        ("many_pixels.jpg", "300 × 300 pixels, at most 0.04 million"),
    ):
        page.upload(tmp_path / name)
        page.complains(complaint)
        if name == "broken.png":  # moving the threshold does not bring the old answer back
            page.move_threshold(0.5)

            def check():
                visit = server.answers[-1].visit
                assert visit is not None
                assert visit.settings[0] == 0.5

            eventually(check)
            assert (server.answers[-1].kind, server.answers[-1].shown) == ("error", None)
            page.complains(complaint)
        page.remove()
    for name, complaint in (
        ("many_bytes.png", "exceed the maximum allowed size"),
        ("notes.txt", "Invalid file type: notes.txt"),
    ):
        page.upload(tmp_path / name)
        page.page.locator("[data-testid=toast-body]", has_text=complaint).wait_for()
        page.says("Drop a picture.")
    assert len(server.passes) == before

    page.upload(good)
    page.says("3.png, 96 × 96 pixels, 3 classes.")
    for names, complaint in (
        ("", "Type the classes to look for"),
        ("cup, Cup", "“Cup” is named twice"),
        ("x" * 81, "81 characters is too long: at most 80"),
        (", ".join(f"c{i}" for i in range(41)), "41 classes are too many: at most 40"),
    ):
        page.type_names(names)
        page.complains(complaint)
    page.type_names("<b>cup</b>")
    page.move_threshold(0)
    page.says("first: 8 of 8")
    page.lists(reference.predict(str(good), vocabulary=["<b>cup</b>"]), ["<b>cup</b>"])


def test_a_dropped_picture_and_examples_stay_on_this_machine(visit, server, world):
    page = visit()
    transfer = page.page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(
                new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            return transfer;
        }""",
        list(world.pictures[3].read_bytes()),
    )
    page.page.dispatch_event(
        "#picture button:has(input[type=file])", "drop", {"dataTransfer": transfer}
    )
    page.says("dropped.png, 96 × 96")
    downloads = server.folder / "downloads"
    before = set(downloads.iterdir())
    page.page.locator(".gallery-item img").nth(1).click()
    page.says("2.png, 96 × 96")
    # The files of a picture go when the next one comes.
    assert len(before - set(downloads.iterdir())) == len(set(downloads.iterdir()) - before) == 1

    hosts = {urlsplit(url).hostname for url in server.requests if not url.startswith("data:")}
    assert hosts - {None} == {"127.0.0.1"}  # None: blob:
    assert len(server.requests) > 10
    assert server.outside == []


def test_visitors_do_not_mix(visit, server, world, reference):
    pages, names = [visit(), visit()], [("cup", "dog"), ("zebra",)]
    before = {title: each.vocabulary for title, each in server.predictors.items()}
    for page, chosen, picture in zip(pages, names, world.pictures, strict=False):
        page.page.fill("#classes textarea", ", ".join(chosen))
        page.upload(picture)  # the second one while the first may still be at work
    for page, file_name, count in zip(pages, ("1.png", "2.png"), (2, 1), strict=True):
        page.says(f"{file_name}, 96 × 96 pixels, {count} class")
    for page, chosen, picture in zip(pages, names, world.pictures, strict=False):
        page.move_threshold(0)
        page.says("first: 8 of 8")
        page.lists(reference.predict(str(picture), vocabulary=chosen), chosen)
        page.download_json(chosen, threshold=0)
    assert {title: each.vocabulary for title, each in server.predictors.items()} == before
    assert before["first"] == MINIATURE_CLASSES


def request(url, body=None, **headers):
    """Ask the server -> (status, content)."""
    asked = urllib.request.Request(url, data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_hands_out_and_fetches_nothing_else(server, world):
    api = server.url.rstrip("/") + "/gradio_api"
    for path in (
        "/file=http://192.0.2.1/a.png",
        "/file=https:/192.0.2.1/a.png",
        "/file=/http://192.0.2.1/a.png",
        "/file=%68ttp://192.0.2.1/a.png",
        "/proxy=http://192.0.2.1/",
    ):
        assert request(api + path)[0] == 403, path
    secret = world.runs[0] / "config.yaml"
    assert request(f"{api}/file={secret}")[0] in (403, 404)
    assert request(f"{api}/info")[0] in (403, 404) or b"detect" not in request(f"{api}/info")[1]
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert b"swagger" not in request(server.url.rstrip("/") + path)[1].lower()

    as_json = {"Content-Type": "application/json"}
    file = {"path": "http://192.0.2.1/a.png", "meta": {"_type": "gradio.FileData"}}
    call = {"data": [None, file, "cup", 0, 10, ""], "fn_index": 0, "session_hash": "s"}
    assert request(f"{api}/queue/join", json.dumps(call).encode(), **as_json)[0] == 403
    call["data"] = ["x" * web_demo.MAX_REQUEST_BYTES]
    assert request(f"{api}/queue/join", json.dumps(call).encode(), **as_json)[0] == 413
    assert server.outside == []


def everything_under(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_nothing_is_left_behind(browser, world, tmp_path):
    """The command itself, in an empty home, with a folder for temporary files of its own."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("GRADIO", "XDG", "HIERKD"))},
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "DETECTRON2_DATASETS": str(world.root),
        "MPLCONFIGDIR": str(world.root / "matplotlib"),  # its list of fonts, for any program
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    before = everything_under(world.root)
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(root / "projects" / "HierKD"), environment.get("PYTHONPATH")])
    )
    command = [sys.executable, str(root / "tools" / "web_demo.py"), "--run", str(world.runs[0])]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu"],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=home,
    )
    watchdog = threading.Timer(TIMEOUT / 1000 * 2, process.kill)
    watchdog.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Open http://127.0.0.1:" in line:
                break
        url = said[-1].partition("Open ")[2].split()[0]
        context = browser.new_context()
        page = Page(context.new_page(), url)
        page.upload(world.pictures[0])
        page.says("1.png, 96 × 96 pixels, 32 classes")
        assert page.download("png")[0] == "1_detections.png"
        (folder,) = temporary.iterdir()
        assert folder.name.startswith("hierkd_web_")
        assert len(everything_under(folder)) > 3
        process.terminate()
        said.append(process.stdout.read())
        assert process.wait(timeout=TIMEOUT / 1000) == 0, "".join(said)
        context.close()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    assert list(temporary.iterdir()) == []
    assert list(home.iterdir()) == []
    new = everything_under(world.root) - before
    assert {Path(path).parts[0] for path in new} <= {"matplotlib"}
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "gone"], "no training's folder 'gone'"),
        (["--port", "70000"], "--port must be 0 to 65535, got 70000"),
        (["--max-megabytes", "0"], "--max-megabytes must be more than 0, got 0"),
        (["--max-megapixels", "-1"], "--max-megapixels must be more than 0"),
        (["--examples", "gone.png"], "gone.png"),
        (["--compare", "a=x", "a=y"], "two detectors are called 'a'"),
    ],
)
def test_wrong_options(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(web_demo.importlib.util, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        web_demo.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_gradio_the_message_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(web_demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        web_demo.main([])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "pip install 'gradio>=6,<7'" in message
    assert message.count("\n") == 1


def test_an_occupied_port_is_named(server, world):
    port = urlsplit(server.url).port
    folder = server.folder.parent / "second"
    folder.mkdir()
    with (
        pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}"),
        web_demo.serving({}, folder, port=port),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_block_and_are_as_before_afterwards(number):
    before = signal.getsignal(number)
    with web_demo.ending_on_signals():
        os.kill(os.getpid(), number)
        threading.Event().wait(10)
        pytest.fail("the signal was not heard")
    assert signal.getsignal(number) is before
