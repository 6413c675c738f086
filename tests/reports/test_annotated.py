"""Names and pages of annotated pictures; tests/test_demo.py has the rest."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hierkd.inference.detections import DetectionFilter
from hierkd.reports.annotated import Annotated, name_outputs, write_annotated_page


def test_names_are_all_different():
    sources = [Path("a/x.jpg"), Path("b/x.png"), Path("X.bmp"), Path("x_1.jpg"), Path("x.mp4")]
    paths = name_outputs(sources, Path("out"), [".png"] * 4 + [".mp4"])
    assert paths[0] == Path("out/x.png")
    assert len({path.stem.casefold() for path in paths}) == 5
    for one, other in (("a/x.jpg", "a/X_heat_maps.jpg"), ("a/x_heat_maps.jpg", "a/x.jpg")):
        stems = {
            p.stem.casefold() for p in name_outputs([Path(one), Path(other)], Path(), [".png"] * 2)
        }
        assert len(stems | {f"{stem}_heat_maps" for stem in stems}) == 4
    with pytest.raises(ValueError, match=r"x_heat_maps\.png is an input"):
        name_outputs([Path("x.jpg"), Path("x_heat_maps.png")], Path(), [".png", ".png"])


@pytest.mark.parametrize("embed", [False, True])
def test_a_page_is_escaped_and_complete(tmp_path, embed):
    name = '<script>alert("1")<_script> & %41#.png'
    Image.fromarray(np.full((48, 64, 3), 3, np.uint8)).save(tmp_path / name)
    (tmp_path / "trip.webm").write_bytes(b"a video")
    done = [
        Annotated((tmp_path / name,), {"file_name": f"a/{name}"}, 2, "2 × <b>cat</b>"),
        Annotated((tmp_path / "trip.webm",), {"file_name": "trip.mp4"}, 0, "", is_video=True),
    ]
    detectors = SimpleNamespace(
        vocabulary=("<i>a</i>", *map(str, range(99))),
        predictors={"mine": None},
        keep=DetectionFilter(0.25, class_thresholds={"7": 0.5}),
    )
    write_annotated_page(tmp_path / "index.html", detectors, done, embed=embed)
    text = (tmp_path / "index.html").read_text()
    for raw in ("<script", "<b>cat", "<i>a"):
        assert raw not in text
    assert "2 × &lt;b&gt;cat&lt;/b&gt;" in text
    assert "58, and 40 more" in text
    assert text.index("trip.mp4") < text.index("&lt;script")  # what is wide comes first
    (source,) = re.findall(r'<img src="([^"]*)"', text)
    (video,) = re.findall(r'<video src="([^"]*)"', text)
    assert source.startswith("data:image/jpeg;base64,") == embed
    assert video.startswith("data:video/webm;base64,") == embed
    if not embed:
        assert source == "%3Cscript%3Ealert%28%221%22%29%3C_script%3E%20%26%20%2541%23.png"
