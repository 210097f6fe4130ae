"""What is drawn is what the pipeline draws and the network routed; what cannot be is said, and the server goes on."""

import base64
import http.client
import itertools
import json
import socket
import threading
import time

import numpy as np
import pytest
import torch

from megadit.playground.page import make_page
from megadit.playground.server import Server
from megadit.sampling import evenness, heatmap
from tests.commands import run_python
from tests.conversion.made import make_run
from tests.page.tree import Tree
from tests.playground.opened import ask, draw, error, opened, overlay, pipeline_of, pixels, refusal

SEVEN = {"prompt": "a handwritten seven", "seed": 5, "steps": 4}


def picture(told):
    (url,) = told["pictures"]
    head, content = url.split(",")
    assert head == "data:image/png;base64"
    return pixels(base64.b64decode(content))


@pytest.fixture(scope="module")
def pipe(captions):
    return pipeline_of(captions)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "call"),
    [
        ({}, {}),
        (
            {"negative": "zero", "guidance": 4.5, "sampler": "unipc"},
            {"negative_prompt": "zero", "guidance_scale": 4.5},
        ),
    ],
)
def test_a_picture_is_the_pipelines(place, pipe, wish, call):
    told = draw(place, **SEVEN, **wish)
    before, pipe.sampler = pipe.scheduler, wish.get("sampler", "heun")
    (expected,) = pipe(SEVEN["prompt"], generator=5, num_inference_steps=4, **call).images
    pipe.scheduler = before
    assert np.array_equal(picture(told), np.asarray(expected))
    assert (told["seed"], told["steps"], told["size"], told["warnings"]) == (5, 4, [8, 8], [])
    assert 0 < told["seconds"] < 60


def test_maps_and_numbers_are_those_of_the_routing(place, pipe):
    told = draw(place, **SEVEN)
    with pipe.recorded() as recording:
        (image,) = pipe(SEVEN["prompt"], generator=5, num_inference_steps=4).images
    trace = recording.trace(1)
    assert (told["layers"], told["times"]) == ([1, 3], pytest.approx([1, 0.75, 0.5, 0.25]))
    assert set(told["branches"]) == {"conditional", "unconditional", "difference"}
    seen = set()
    for branch, scale in told["branches"].items():
        maps_SLT = trace.maps(branch)
        largest = max(1, np.abs(maps_SLT).max())
        assert (scale["low"], scale["high"]) == (-largest if branch == "difference" else 0, largest)
        colours = {"low": scale["low"], "colours": heatmap.COLOURS[branch]}
        for (row, layer), step in itertools.product(enumerate(told["layers"]), ["mean", 0, 1, 2, 3]):
            takers_T = maps_SLT[:, row].mean(0) if step == "mean" else maps_SLT[step, row]
            expected = heatmap.overlay(image, takers_T, (4, 4), largest, size=(384, 384), **colours)
            found = overlay(place, drawing=told["drawing"], layer=layer, step=step, branch=branch)
            assert np.array_equal(found, np.asarray(expected)), (branch, layer, step)
            seen.add(found.tobytes())
    assert len(seen) > 10, "maps of layers, steps and branches differ"
    for row in told["evenness"]:
        each = [evenness.evenness(takers_T) for takers_T in trace.maps()[:, told["layers"].index(row["layer"])]]
        assert row["cv"] == pytest.approx(np.mean([one.cv for one in each]))
    assert [row["layer"] for row in told["evenness"]] == [1, 3]


def test_without_guidance_there_is_one_branch(place):
    told = draw(place, **SEVEN, guidance=1)
    assert list(told["branches"]) == ["conditional"] and told["evenness"][0]["differs"] is None
    wanted = f"/overlay?drawing={told['drawing']}&layer=1&step=0&branch=difference"
    assert error(place, "GET", wanted) == (404, "there is no map 'difference'; this drawing has: conditional")


def test_a_pipeline_from_disk_draws_the_same(place, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    with opened(tmp_path / "saved", "--device", "cpu") as other:
        here, there = draw(place, **SEVEN), draw(other, **SEVEN)
        assert here["pictures"] == there["pictures"]
        status, _, content = ask(other, "GET", "/")
        assert status == 200 and "Playground: saved" in content.decode()


def test_a_dense_model_of_classes_in_colour(dense):
    with opened(dense) as place:
        told = draw(place, prompt="7", steps=2)
        (expected,) = pipeline_of(dense)(7, generator=0, num_inference_steps=2).images
        assert picture(told).shape == (8, 8, 3)
        assert np.array_equal(picture(told), np.asarray(expected))
        assert (told["layers"], told["branches"], told["evenness"]) == ([], {}, [])
        refused = error(place, "POST", "/draw", {"prompt": "a seven"})
        assert refused == (400, "prompt 'a seven' is not a class; write its number, 0 to 9")
        tree = Tree(ask(place, "GET", "/")[2].decode().partition("\n")[2]).open[0]
        why = "There is none: no layer of this model has experts (model.experts=0), so nothing is routed."
        assert tree.one("section", id="no-maps").one("p").text == why
        assert tree.one("label", for_="prompt").text == "class, 0 to 9"


def test_pictures_that_are_routed_together(tmp_path):
    """One is asked for, and the group's others are drawn and thrown away."""
    run = tmp_path / "run"
    make_run(run, "model.conditioning=class", "model.classes=10", "model.routing_group=4")
    with opened(run) as place:
        told = draw(place, prompt="3", steps=2, seed=1)
        pipe = pipeline_of(run)
        with pipe.recorded() as recording:
            (expected,) = pipe(3, generator=1, num_inference_steps=2).images
        assert np.array_equal(picture(told), np.asarray(expected))
        takers_T = recording.trace(4).maps()[1, 0]
        high = told["branches"]["conditional"]["high"]
        wanted = heatmap.overlay(expected, takers_T, (4, 4), high, size=(384, 384))
        assert np.array_equal(overlay(place, drawing=told["drawing"], layer=1, step=1), np.asarray(wanted))


def test_latents_that_nothing_decodes_show_their_first_channel(tmp_path):
    run = tmp_path / "run"
    make_run(run, "model.conditioning=class", "model.classes=10", "model.channels=4")
    with opened(run) as place:
        told = draw(place, prompt="3", steps=2)
        drawn = pipeline_of(run)(3, generator=0, num_inference_steps=2, output_type="latent").images
        expected = ((drawn[0, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        assert np.array_equal(picture(told), expected.numpy())
        assert told["warnings"] == ["the picture is the first of 4 channels of latents: no autoencoder is named"]


def test_one_at_a_time_with_progress(place):
    """A second wish is refused, maps are given, and the first wish comes to its end."""
    earlier, found = draw(place, **SEVEN), []
    thread = threading.Thread(target=lambda: found.append(draw(place, prompt="a long one", steps=400)))
    thread.start()
    seen = [0]
    while seen[-1] < 5:
        told = json.loads(ask(place, "GET", "/progress")[2])
        assert not told or told["steps"] == 400
        seen.append(told.get("done", 0))
        assert thread.is_alive()
    status, message = error(place, "POST", "/draw", SEVEN)
    assert status == 409 and message.startswith("another picture is being drawn, step ")
    assert message.endswith(" of 400; draw yours when it is done")
    assert overlay(place, drawing=earlier["drawing"], layer=1, step=0).shape == (384, 384, 3)
    thread.join()
    assert seen == sorted(seen) and found[0]["steps"] == 400
    assert ask(place, "GET", "/progress")[2] == b"{}"


def test_old_drawings_are_forgotten(place):
    first = draw(place, **SEVEN)
    for seed in range(16):
        assert overlay(place, drawing=first["drawing"], layer=1, step=0).any()
        draw(place, prompt="a seven", steps=1, seed=seed)
    message = "this drawing is not kept any more; draw it again"
    assert error(place, "GET", f"/overlay?drawing={first['drawing']}&layer=1&step=0") == (404, message)


def test_a_prompt_that_is_cut_is_warned_of(place):
    long = "a handwritten seven " * 20
    warned = draw(place, prompt=long, steps=1)["warnings"]
    assert warned == [f"the prompt {long.strip()!r} is cut to the 28 tokens that the model reads"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"prompt": " "}, "the prompt is empty; say what to draw"),
        ({}, "the prompt is empty; say what to draw"),
        ({"prompt": 7}, "prompt is 7; write a text"),
        ({"prompt": "a" * 2001}, "prompt has 2001 letters; write at most 2000"),
        ({"prompt": "\ud800"}, "prompt is no text that can be written as UTF-8: surrogates not allowed"),
        (SEVEN | {"steps": 0}, "steps is 0; write a whole number from 1 to 1000"),
        (SEVEN | {"steps": 1001}, "steps is 1001; write a whole number from 1 to 1000"),
        (SEVEN | {"steps": 2.5}, "steps is 2.5; write a whole number from 1 to 1000"),
        (SEVEN | {"steps": True}, "steps is true; write a whole number from 1 to 1000"),
        (SEVEN | {"seed": -1}, "seed is -1; write a whole number from 0 to 9007199254740991"),
        (SEVEN | {"guidance": -0.5}, "guidance is -0.5; write a number from 0 to 100"),
        (SEVEN | {"guidance": float("nan")}, "guidance is NaN; write a number from 0 to 100"),
        (SEVEN | {"guidance": None}, "guidance is null; write a number from 0 to 100"),
        (SEVEN | {"sampler": "ddim"}, "sampler is 'ddim'; choose one of euler, heun, dpm++, unipc"),
        (SEVEN | {"size": 8}, "'size' is no field; those are prompt, negative, seed, steps, guidance, sampler"),
        ([1], 'what was sent is no JSON object; send one such as {"prompt": "a seven"}'),
    ],
)
def test_bad_wishes_are_named(place, wish, message):
    assert error(place, "POST", "/draw", wish) == (400, message)


def test_what_is_no_json(place):
    status, message = error(place, "POST", "/draw", b"prompt=seven", Content_Type="application/json")
    assert status == 400 and message.startswith("what was sent is no JSON: ")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/../etc/passwd", 404, "there is no /../etc/passwd"),
        ("POST", "/", 404, "there is no / to post to"),
        ("GET", "/overlay", 404, "this drawing is not kept any more; draw it again"),
        ("GET", "/overlay?drawing=X&layer=9&step=0", 404, "layer 9 has no experts; those of this model have: 1, 3"),
        ("GET", "/overlay?drawing=X&layer=1&step=4", 404, "there is no step 4; this drawing has steps 0 to 3"),
        ("GET", "/overlay?drawing=X&layer=1&step=-1", 404, "there is no step -1; this drawing has steps 0 to 3"),
        ("GET", "/overlay?drawing=X&layer=one", 400, "say layer=NUMBER and step=NUMBER, or step=mean"),
    ],
)
def test_what_there_is_not(place, method, path, status, message):
    name = draw(place, **SEVEN)["drawing"] if "=X" in path else ""
    assert error(place, method, path.replace("=X", f"={name}")) == (status, message)


def test_pictures_that_are_not_finite(pipe, captions, tmp_path):
    broken = pipeline_of(captions)
    with torch.no_grad():
        next(p for name, p in broken.transformer.named_parameters() if name.startswith("head")).fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    with opened(tmp_path / "broken") as place:
        for _ in range(2):
            status, message = error(place, "POST", "/draw", SEVEN)
            assert status == 400 and message.startswith("of 1 pictures 1 are not finite, from step 1 of 4 on: 0 ('a ha")
        assert ask(place, "GET", "/")[0] == 200


# --- whom it serves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "10.0.0.7", "", "[::1", "localhost.evil.example"]
)
def test_other_hosts_are_refused(place, host):
    """A page from elsewhere whose name leads here gets nothing."""
    for method, path in (("GET", "/"), ("GET", "/progress"), ("POST", "/draw")):
        status, message = error(place, method, path, SEVEN if method == "POST" else None, Host=host)
        where = f"the playground is at http://127.0.0.1:{place[1]}/, not at this host"
        assert (status, message) == (403, f"{where}; it answers to localhost and loopback addresses")


def test_pages_from_elsewhere_cannot_draw(place):
    here = f"127.0.0.1:{place[1]}"
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null", f"http://{here}.evil.example"):
        assert error(place, "POST", "/draw", SEVEN, Origin=origin) == (403, f"pages of {origin} may not draw here")
    # What a form of another page could send without being asked for an Origin.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        refused = error(place, "POST", "/draw", b'{"prompt": "a seven"}', Content_Type=kind)
        assert refused == (415, "post JSON, with Content-Type: application/json")
    assert ask(place, "POST", "/draw", SEVEN, Origin=f"http://{here}")[0] == 200
    forwarded = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}  # a port that ssh forwards
    assert ask(place, "POST", "/draw", SEVEN, **forwarded)[0] == 200


def test_bodies_have_a_length_and_a_limit(place):
    kind = {"Content_Type": "application/json"}
    assert error(place, "POST", "/draw", b" " * 65537, **kind) == (413, "post at most 65536 bytes")
    for length in ("-1", "x", "²"):
        connection = http.client.HTTPConnection(*place, timeout=20)
        connection.putrequest("POST", "/draw")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", length.encode())
        connection.endheaders()
        assert connection.getresponse().status == 411
        connection.close()
    with socket.create_connection(place, timeout=20) as client:  # goes away in the middle of what it says
        head = f"POST /draw HTTP/1.1\r\nHost: 127.0.0.1:{place[1]}\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
    assert draw(place, **SEVEN)["seed"] == 5


def test_a_browser_that_goes_away_leaves_the_server_drawing(place):
    body = json.dumps(SEVEN | {"steps": 30}).encode()
    head = "POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(place, timeout=20) as client:
        client.sendall(head.encode() + body)
        while ask(place, "GET", "/progress")[2] == b"{}":
            time.sleep(0.01)
    while ask(place, "GET", "/progress")[2] != b"{}":
        time.sleep(0.05)
    assert draw(place, **SEVEN)["seed"] == 5


def test_a_server_for_other_machines_goes_by_the_names_of_this_one(monkeypatch):
    """Looked up once, at the start."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Node7")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node7.cluster.example")
    with Server("0.0.0.0", 0) as server:
        monkeypatch.setattr(socket, "getfqdn", None)
        assert server.url == f"http://Node7:{server.server_address[1]}/"
        for host in ("node7", "NODE7:80", "node7.cluster.example", "node7.cluster.example.", "localhost", "10.1.2.3"):
            assert server.is_own(host), host
        for host in ("node8", "node7.evil.example", "cluster.example"):
            assert not server.is_own(host), host
        assert server.answers_to == "localhost, node7, node7.cluster.example and addresses"
    with Server("127.0.0.1", 0) as server:
        assert not server.is_own("node7") and server.url == f"http://127.0.0.1:{server.server_address[1]}/"


def test_which_hosts_are_this_one():
    for bound, own, others in (
        ("127.0.0.1", ["localhost", "LOCALHOST:9", "127.0.0.1:7860", "[::1]:7860"], ["10.0.0.7", socket.gethostname()]),
        ("0.0.0.0", ["localhost", "10.0.0.7:80", socket.gethostname()], ["evil.example", "evil.example:80", ""]),
    ):
        with Server(bound, 0) as server:
            assert all(map(server.is_own, own)) and not any(map(server.is_own, others)), bound


def test_the_page_says_what_it_may_load_and_escapes_the_name(place, pipe):
    _, headers, content = ask(place, "GET", "/")
    tree = Tree(content.decode().partition("\n")[2]).open[0]
    assert tree.one("h1").text == "Playground: captions <b>"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    page = make_page(pipe, 'x"><script>alert(1)</script>')
    assert len(list(Tree(page.html.partition("\n")[2]).open[0].all("script"))) == 1


# --- what cannot be opened --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost")])
def test_a_port_in_use_is_named_before_the_model_is_looked_at(host, name, tmp_path):
    (tmp_path / "config.yaml").write_text("no: run\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(tmp_path, "--port", port, "--host", host)
    why = "cannot be had: Address already in use; choose another one with --port, or 0 for any that is free"
    assert said == f"playground: port {port} of {name} {why}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "playground: port 70000 of 127.0.0.1 cannot be had: "),
        (["--host", "no.such.host.invalid"], "playground: port 7860 of no.such.host.invalid cannot be had: "),
        (["--port", "0", "--device", "abacus"], "playground: --device abacus: Expected one of cpu, cuda"),
        (["--port", "0"], "playground: "),
    ],
)
def test_bad_flags_and_runs(tmp_path, flags, message):
    (tmp_path / "config.yaml").write_text("no: run\n")
    said = refusal(tmp_path, *flags)
    assert said.startswith(message) and said.count("\n") == 1


def test_folders_that_hold_no_model(tmp_path):
    said = refusal(tmp_path)
    assert said == (
        f"playground: {tmp_path} is neither a run (it has no config.yaml) nor a pipeline (it has no model_index.json); "
        "name a training's run.dir, or a folder that save_pretrained wrote\n"
    )
    said = refusal(tmp_path / "none")
    assert said.startswith(f"playground: {tmp_path / 'none'}: there is no such folder; ")


def test_a_pipeline_has_nothing_to_download(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    said = refusal(tmp_path, "--online")
    assert said == f"playground: --online is for runs: {tmp_path} is a pipeline, which has its encoders in it\n"


def test_help_teaches():
    done = run_python("tools/playground.py", "--help")
    assert done.returncode == 0 and "ssh -L 7860:127.0.0.1:7860" in done.stdout
