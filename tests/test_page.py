"""The page clients/live.html in a real browser, with a microphone that plays a sample, against the live server."""

import contextlib
import functools
import http.server
import shutil
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, Server, free_ports, needs_nginx, origin, transcripts
from selenium.common.exceptions import TimeoutException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_hotwords import MISHEARD, SAID, spoken_clip
from test_live import pcm_of
from test_live_server import the_worker
from test_quality import HELD_OUT

from handler import decode_audio

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs a browser, Debian's packages chromium and chromium-driver",
)
TEXT = "four seven two"


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of the page, served as docs/live.md says."""
    files = functools.partial(QuietFiles, directory=ROOT / "clients")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{pages.server_port}/live.html"
        pages.shutdown()


@pytest.fixture(scope="module")
def live_server(digits_pt, page) -> Iterator[Server]:
    origin = page.removesuffix("/live.html")
    cors = (ROOT / "cors.properties").read_text().replace("http://127.0.0.1:8000", origin)
    assert origin in cors
    server = Server(digits_pt, config=cors, live={"beam_width": 4})
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """What Chromium's microphone plays: nothing, while a slow machine begins to listen; the sample; then nothing."""
    path, silence = tmp_path_factory.mktemp("microphone") / "speech.wav", bytes(2 * 16_000)
    with wave.open(str(SAMPLES / "three-digits.wav")) as source, wave.open(str(path), "wb") as target:
        target.setparams(source.getparams())
        target.writeframes(5 * silence + source.readframes(source.getnframes()) + 20 * silence)
    return path


@contextlib.contextmanager
def browser(page: str, server_url: str, *options: str) -> Iterator[Chrome]:
    """The page in headless Chromium, which is told where the server is, unless it has to know ("")."""
    settings = ChromeOptions()
    settings.binary_location = shutil.which("chromium")
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *options):
        settings.add_argument(option)
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(settings, Service(shutil.which("chromedriver")))
    try:
        chrome.get(page)
        field = chrome.find_element(By.ID, "server")
        if server_url:
            field.clear()
            field.send_keys(server_url)
        yield chrome
    finally:
        chrome.quit()


def spoken(name: str) -> bytes:
    """A sample as PCM."""
    return pcm_of(decode_audio((SAMPLES / name).read_bytes()))


# A microphone whose sound begins when the page begins to listen, and has no gaps: Chromium's own one has begun by then,
# on a busy machine long ago. After the sound it hears nothing, for as long as it takes.
MICROPHONE = """
    const pcm = Int16Array.from(arguments[0]), Context = window.AudioContext;
    navigator.mediaDevices.getUserMedia = async () => {
      const audio = new Context(), source = new AudioBufferSourceNode(audio, { buffer:
        new AudioBuffer({ length: pcm.length, sampleRate: 16000 }) });
      source.buffer.copyToChannel(Float32Array.from(pcm, (sample) => sample / 32768), 0);
      const silence = new ConstantSourceNode(audio, { offset: 0 }), sound = new GainNode(audio);
      const microphone = new MediaStreamAudioDestinationNode(audio);
      for (const each of [source, silence]) each.connect(sound);
      sound.connect(microphone);
      window.AudioContext = function () { return audio; };
      audio.createMediaStreamSource = () => { source.start(); silence.start(); return sound; };
      return microphone.stream;
    };"""


def hears(chrome: Chrome, pcm: bytes) -> None:
    """From now on the page's microphone brings this sound when the page listens."""
    chrome.execute_script(MICROPHONE, memoryview(pcm).cast("h").tolist())


def microphone(speech: Path) -> tuple[str, ...]:
    return (
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",  # says yes
        f"--use-file-for-fake-audio-capture={speech}%noloop",
    )


def base(server: Server) -> str:
    return server.url.removesuffix("/predictions/emformer_asr")


def text(chrome: Chrome, name: str) -> str:
    return chrome.find_element(By.ID, name).get_property("textContent")


def wait_for(chrome: Chrome, what, seconds: int = 300):
    """What ``what`` returns, once that is true. If it never is, the error tells what the page shows."""
    try:
        return WebDriverWait(chrome, seconds, poll_frequency=0.05).until(what)
    except TimeoutException as error:
        shown = {name: text(chrome, name) for name in ("status", "message", "text", "transcript")}
        raise AssertionError(f"waited in vain; the page shows {shown}") from error


def errors(chrome: Chrome) -> list[str]:
    return [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]


@needs_nginx
def test_behind_the_proxy_the_page_asks_its_own_address(live_server):
    address = origin(live_server)
    with browser(f"{address}/", "") as chrome:
        hears(chrome, spoken("three-digits.wav"))
        assert chrome.find_element(By.ID, "server").get_property("value") == address
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "three-digits.wav"))
        wait_for(chrome, lambda chrome: text(chrome, "transcript") == TEXT)
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda chrome: text(chrome, "text") == TEXT)
        assert not errors(chrome)


def test_the_text_appears_while_one_speaks_and_is_right(page, live_server, pytestconfig):
    """Ten words: on a busy machine the first answer may come after three."""
    said = transcripts("digits")["zero-to-nine.mp3"]
    screenshot = pytestconfig.getoption("screenshot")
    with browser(page, base(live_server), "--window-size=820,860") as chrome:
        hears(chrome, spoken("zero-to-nine.mp3"))
        if screenshot:
            chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
            wait_for(chrome, lambda _: len(chrome.find_elements(By.CSS_SELECTOR, "#links a")) == 2)
        chrome.execute_script("""
            const text = document.getElementById("text");
            window.seen = [];
            const watch = new MutationObserver(() => { seen.push(text.textContent); });
            watch.observe(text, { childList: true, subtree: true });""")
        button = chrome.find_element(By.ID, "speak")
        button.click()

        def grown(_) -> bool:
            if screenshot and chrome.execute_script("return document.querySelector('#text i')?.textContent"):
                chrome.save_screenshot(str(screenshot))
            return text(chrome, "text") == said

        wait_for(chrome, grown)
        seen = chrome.execute_script("return seen")
        assert [each for each in seen if each and each != said], seen  # while one speaks, not at the end
        assert button.text == "Stop"
        assert "ms" in text(chrome, "latency")
        button.click()
        wait_for(chrome, lambda _: text(chrome, "status") == f"Transcript: {said}")
        wait_for(chrome, lambda _: button.text == "Speak")
        assert (text(chrome, "text"), text(chrome, "message")) == (said, "")
        assert chrome.find_element(By.ID, "level").get_property("value") == 0
        assert not errors(chrome)


def test_finished_sentences_stay_above_one_that_grows(page, live_server):
    """The one that grows has ten words: a shorter one may come at once on a busy machine."""
    said = transcripts("digits")["zero-to-nine.mp3"]
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken("three-digits.wav") + bytes(2 * 32_000) + spoken("zero-to-nine.mp3"))
        chrome.execute_script("""
            window.seen = [];
            const lines = () => [...document.querySelectorAll("#text p")].map((line) => line.textContent);
            const watch = new MutationObserver(() => { seen.push(lines()); });
            watch.observe(document.getElementById("text"), { childList: true, subtree: true });""")
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: chrome.execute_script("return seen.at(-1)") == [TEXT, said, ""])
        seen = chrome.execute_script("return seen")
        growing = [lines[1] for lines in seen if len(lines) == 2 and lines[0] == TEXT]
        assert {*growing} - {"", said}, seen  # below the first, while it is said
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: chrome.find_element(By.ID, "speak").text == "Speak")
        assert text(chrome, "status") == f"Transcript: {said}"  # each was read aloud once
        assert not errors(chrome)


def test_of_the_browser_s_own_microphone_the_level_follows_the_voice_and_words_are_heard(page, live_server, speech):
    """Which words is asserted with a microphone that has no gaps, as this one has on a busy machine."""
    with browser(page, base(live_server), *microphone(speech)) as chrome:
        loudest = "window.loudest = 0; setInterval(() => { loudest = Math.max(loudest, level.value); }, 10);"
        chrome.execute_script(loudest)
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: chrome.execute_script("return loudest") > 0.2)
        wait_for(chrome, lambda _: set(text(chrome, "text").split()) & set(TEXT.split()))


def test_a_file_gives_its_words_and_subtitles(page, live_server, tmp_path):
    with browser(page, base(live_server)) as chrome:
        chrome.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
        wait_for(chrome, lambda _: len(chrome.find_elements(By.CSS_SELECTOR, "#links a")) == 2)
        assert text(chrome, "transcript") == "seven three zero two"
        rows = chrome.find_elements(By.CSS_SELECTOR, "#words tbody tr")
        assert [row.text.split()[0] for row in rows] == ["seven", "three", "zero", "two"]
        for link in chrome.find_elements(By.CSS_SELECTOR, "#links a"):
            link.click()
        for name, head in (("pin.vtt", "WEBVTT"), ("pin.srt", "1\n")):
            wait_for(chrome, lambda _, file=tmp_path / name: file.exists() and "two" in file.read_text())
            assert (tmp_path / name).read_text().startswith(head)
        assert not errors(chrome)


def test_a_file_that_is_no_audio_gets_the_server_s_sentence(page, live_server):
    with browser(page, base(live_server)) as chrome:
        chrome.find_element(By.ID, "file").send_keys(str(ROOT / "requirements.txt"))
        wait_for(chrome, lambda _: "is not audio I can read" in text(chrome, "message"))


def test_a_refused_microphone_is_said(page, live_server):
    with browser(page, base(live_server), "--use-fake-device-for-media-stream") as chrome:
        denied = {"permission": {"name": "microphone"}, "setting": "denied", "origin": page.removesuffix("/live.html")}
        chrome.execute_cdp_cmd("Browser.setPermission", denied)
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: "The microphone was refused" in text(chrome, "message"))
        assert chrome.find_element(By.ID, "speak").text == "Speak"


def test_a_microphone_that_goes_away_is_said_and_the_text_stays(page, live_server):
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken("three-digits.wav"))
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: text(chrome, "text") == TEXT)
        chrome.execute_script("speaking.microphone.getTracks()[0].dispatchEvent(new Event('ended'))")
        wait_for(chrome, lambda _: text(chrome, "status") == f"Transcript: {TEXT}")
        wait_for(chrome, lambda _: chrome.find_element(By.ID, "speak").text == "Speak")
        assert "microphone is gone" in text(chrome, "message") and text(chrome, "text") == TEXT


# Answers come late, as over a slow network: the first few, as many as it is told, not before ``release()`` is called.
SLOW = """
    const real = window.fetch;
    let held = arguments[0];
    window.sent = [];
    const released = new Promise((resolve) => { window.release = resolve; });
    window.fetch = async (url, request) => {
      sent.push({ bytes: request.body.size ?? request.body.byteLength, headers: request.headers });
      const late = held-- > 0, answer = await real(url, request);
      if (late) await released;
      return answer;
    };"""


def test_after_stop_nothing_is_recorded_any_more(page, live_server):
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken("three-digits.wav"))
        chrome.execute_script("delete window.MediaRecorder")  # of PCM the bytes tell the time
        chrome.execute_script(SLOW, 1)
        button = chrome.find_element(By.ID, "speak")
        begun = time.monotonic()
        button.click()
        wait_for(chrome, lambda _: chrome.execute_script("return sent.length") == 1)
        chrome.execute_script("window.track = speaking.microphone.getTracks()[0]")
        time.sleep(1)
        button.click()
        seconds = time.monotonic() - begun
        wait_for(chrome, lambda _: chrome.execute_script("return track.readyState") == "ended")
        assert button.text == "Finishing\N{HORIZONTAL ELLIPSIS}"
        time.sleep(3)
        chrome.execute_script("release()")
        wait_for(chrome, lambda _: button.text == "Speak")
        sent = chrome.execute_script("return sent.reduce((sum, { bytes }) => sum + bytes, 0)")
        assert 0.5 < sent / 32_000 < seconds + 2


def test_the_browser_sends_opus_a_tenth_of_the_bytes_or_else_pcm_and_the_text_is_the_same(page, live_server):
    for opus in (True, False):
        with browser(page, base(live_server)) as chrome:
            hears(chrome, spoken("three-digits.wav"))
            if not opus:
                chrome.execute_script("delete window.MediaRecorder")
            chrome.execute_script(SLOW, 0)
            chrome.execute_script("""
                window.heard = 0;
                const hear = Utterance.prototype.hear;
                Utterance.prototype.hear = function (pcm) { heard += pcm.byteLength; hear.call(this, pcm); };""")
            chrome.find_element(By.ID, "speak").click()
            wait_for(chrome, lambda _: text(chrome, "text") == TEXT)
            chrome.find_element(By.ID, "speak").click()
            wait_for(chrome, lambda _: text(chrome, "status") == f"Transcript: {TEXT}")
            sent, heard = chrome.execute_script("return [sent, heard]")
            assert {each["headers"]["x-encoding"] for each in sent} == {"opus" if opus else "pcm"}
            part = sum(each["bytes"] for each in sent) / heard
            assert part < 0.125 if opus else 0.9 < part <= 1.0


@pytest.mark.parametrize("seconds", [0.16, 1.0])
def test_what_waited_goes_in_requests_that_the_server_takes(page, live_server, seconds):
    """Of a minute of Opus, in pieces as they were asked for and in longer ones, as of a page in the background."""
    with browser(page, "") as chrome:
        taken = chrome.execute_script(
            """
            const waiting = Object.assign(Object.create(Utterance.prototype), { opus: true, chunks: [] }), taken = [];
            for (let time = 0; time < 60000; time += 1000 * arguments[0])
              waiting.chunks.push({ blob: new Blob(["x"]), time });
            while (waiting.chunks.length) taken.push(waiting.take().body.size);
            return taken;""",
            seconds,
        )
    assert sum(taken) == round(60 / seconds) and max(taken) * seconds <= 21, taken


@pytest.mark.parametrize("late", [0, 1500])
def test_a_page_whose_worker_dies_loses_no_word_and_begins_anew(page, live_server, late):
    """Also where what the browser records as Opus comes so many milliseconds after the same as PCM."""
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken("three-digits.wav"))
        chrome.execute_script(SLOW, 0)
        if late:
            chrome.execute_script(LATE, late)
        chrome.find_element(By.ID, "speak").click()
        worker = the_worker(live_server)
        wait_for(chrome, lambda _: text(chrome, "text").startswith("four"))
        worker.kill()
        wait_for(chrome, lambda _: len(chrome.execute_script(NAMES)) > 1 and text(chrome, "text") == TEXT, 300)
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: text(chrome, "status") == f"Transcript: {TEXT}")
        assert (text(chrome, "message"), text(chrome, "text")) == ("", TEXT)


@pytest.mark.parametrize("opus", [True, False])
def test_what_was_finished_before_the_worker_died_is_not_heard_again(page, live_server, opus):
    def lines() -> list[str]:
        return chrome.execute_script("return [...document.querySelectorAll('#text p')].map((line) => line.textContent)")

    with browser(page, base(live_server)) as chrome:
        sentence, pause = spoken("pin.webm"), bytes(2 * 32_000)
        hears(chrome, spoken("three-digits.wav") + pause + sentence + pause + sentence + pause)
        chrome.execute_script(SLOW, 0)
        if not opus:
            chrome.execute_script("delete window.MediaRecorder")
        chrome.find_element(By.ID, "speak").click()
        told = [TEXT, "seven three zero two", "seven three zero two", ""]
        for number in (1, 2):  # after the first loss it sends PCM
            wait_for(chrome, lambda _, number=number: lines()[number:] and "seven" in lines()[number])
            the_worker(live_server).kill()
            wait_for(chrome, lambda _, number=number: len(chrome.execute_script(NAMES)) > number, 300)
        wait_for(chrome, lambda _: len(lines()) == len(told) and not lines()[-1], 300)
        # Of Opus the clock alone tells what was finished: where the page is slow, the end of a word may come again.
        assert lines() == told or (opus and all(map(str.endswith, lines(), told))), lines()
        assert text(chrome, "message") == ""


def test_a_piece_that_gets_no_answer_is_sent_again(page, live_server):
    """Whether it was the piece that was lost or its answer."""
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken("three-digits.wav"))
        chrome.execute_script(SILENT)
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: text(chrome, "text") == TEXT)
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: text(chrome, "status") == f"Transcript: {TEXT}")
        assert (text(chrome, "message"), chrome.execute_script("return lost")) == ("", [0, 1])


# The first two pieces get no answer when they are first sent: one does not reach the server, the other does.
SILENT = """
    const real = window.fetch;
    window.lost = [];
    UNANSWERED[0] = UNANSWERED[1] = 3000;
    window.fetch = async (url, request) => {
      const piece = lost.length;
      if (piece > 1 || request.headers["x-piece"] !== String(piece)) return real(url, request);
      lost.push(piece);
      const never = new Promise((_, reject) => { request.signal.onabort = () => reject(request.signal.reason); });
      never.catch(() => {});
      if (piece) await real(url, { ...request, signal: undefined });
      return never;
    };"""
LATE = """
    const record = Utterance.prototype.record, late = arguments[0];
    Utterance.prototype.record = function (blob) { setTimeout(() => record.call(this, blob), late); };"""
NAMES = "return [...new Set(sent.map(({ headers }) => headers.ts_request_sequence_id))]"


def test_a_microphone_that_cannot_be_used_is_given_back(page, live_server, speech):
    with browser(page, base(live_server), *microphone(speech)) as chrome:
        chrome.execute_script("""
            window.AudioWorkletNode = function () { throw new Error("no such thing"); };
            const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
            navigator.mediaDevices.getUserMedia = async (options) => (window.given = await ask(options));""")
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: "does not work: no such thing" in text(chrome, "message"))
        assert chrome.execute_script("return given.getTracks().map((track) => track.readyState)") == ["ended"]
        assert chrome.find_element(By.ID, "speak").text == "Speak"


def test_of_two_files_the_later_one_is_shown(page, live_server):
    with browser(page, base(live_server)) as chrome:
        chrome.execute_script(SLOW, 1)
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "three-digits.wav"))
        wait_for(chrome, lambda _: len(chrome.find_elements(By.CSS_SELECTOR, "#links a")) == 2)
        assert text(chrome, "transcript") == TEXT
        chrome.execute_script("release()")
        wait_for(chrome, lambda _: chrome.execute_script("return sent.length") == 6)
        time.sleep(0.5)
        links = chrome.find_elements(By.CSS_SELECTOR, "#links a")
        assert [link.get_property("download") for link in links] == ["three-digits.vtt", "three-digits.srt"]
        assert text(chrome, "transcript") == TEXT


def test_a_token_goes_with_every_request(page, live_server):
    with browser(page, base(live_server)) as chrome:
        chrome.find_element(By.ID, "token").send_keys("secret")
        chrome.execute_script(SLOW, 0)
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
        wait_for(chrome, lambda _: len(chrome.find_elements(By.CSS_SELECTOR, "#links a")) == 2)
        sent = chrome.execute_script("return sent.map(({ headers }) => headers.Authorization)")
        assert sent == ["Bearer secret"] * 3


def test_phrases_that_are_expected_are_heard_in_speech_and_files(page, live_server):
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken_clip(MISHEARD))
        for phrases in ("", f"{SAID}: 5, oh oh"):
            chrome.find_element(By.ID, "hotwords").send_keys(phrases)
            chrome.find_element(By.ID, "file").send_keys(str(HELD_OUT / MISHEARD))
            wait_for(chrome, lambda _: len(chrome.find_elements(By.CSS_SELECTOR, "#links a")) == 2)
            chrome.find_element(By.ID, "speak").click()
            wait_for(chrome, lambda _: chrome.find_element(By.ID, "speak").text == "Stop")  # the text before is gone
            wait_for(chrome, lambda _: len(chrome.find_elements(By.CSS_SELECTOR, "#text p")) == 2)  # it has ended
            chrome.find_element(By.ID, "speak").click()
            wait_for(chrome, lambda _: chrome.find_element(By.ID, "speak").text == "Speak")
            heard = [text(chrome, "transcript"), text(chrome, "text")]
            assert heard == [SAID] * 2 if phrases else SAID not in heard
        chrome.find_element(By.ID, "hotwords").send_keys(", \N{LATIN SMALL LETTER C WITH CARON}")
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: "cannot write hotword 3" in text(chrome, "message"))


def test_a_missing_microphone_is_said(page, live_server):
    with browser(page, base(live_server), "--use-fake-ui-for-media-stream") as chrome:
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: "no microphone" in text(chrome, "message"))


def test_a_server_that_is_away_is_said(page, speech):
    [port] = free_ports(1)
    with browser(page, f"http://127.0.0.1:{port}", *microphone(speech)) as chrome:
        chrome.find_element(By.ID, "speak").click()
        wait_for(chrome, lambda _: "make run-live" in text(chrome, "message"))
        wait_for(chrome, lambda _: chrome.find_element(By.ID, "speak").text == "Speak")
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
        wait_for(chrome, lambda _: "make run-live" in text(chrome, "message"))


def test_a_page_from_elsewhere_gets_nothing(page, live_server):
    elsewhere = page.replace("127.0.0.1", "localhost")  # another origin
    with browser(elsewhere, base(live_server)) as chrome:
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
        wait_for(chrome, lambda _: "does it allow http://localhost" in text(chrome, "message"))
        assert text(chrome, "transcript") == ""


def test_the_keyboard_is_enough(page, live_server):
    with browser(page, base(live_server)) as chrome:
        hears(chrome, spoken("three-digits.wav"))
        chrome.switch_to.active_element.send_keys(Keys.TAB)  # from the server's field
        assert chrome.switch_to.active_element.get_property("id") == "token"
        chrome.switch_to.active_element.send_keys(Keys.TAB)
        assert chrome.switch_to.active_element.get_property("id") == "hotwords"
        chrome.switch_to.active_element.send_keys(Keys.TAB)
        assert chrome.switch_to.active_element.get_property("id") == "speak"
        chrome.switch_to.active_element.send_keys(Keys.ENTER)
        wait_for(chrome, lambda _: text(chrome, "text") == TEXT)
        assert chrome.switch_to.active_element.get_property("id") == "speak"
        chrome.switch_to.active_element.send_keys(Keys.ENTER)
        wait_for(chrome, lambda _: text(chrome, "status") == f"Transcript: {TEXT}")
        chrome.switch_to.active_element.send_keys(Keys.TAB)
        assert chrome.switch_to.active_element.get_property("id") == "choose"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_reads_well_in_light_and_dark(page, live_server, scheme):
    with browser(page, base(live_server)) as chrome:
        chrome.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chrome.find_element(By.ID, "file").send_keys(str(SAMPLES / "pin.webm"))
        wait_for(chrome, lambda _: chrome.find_elements(By.CSS_SELECTOR, "#words tbody tr"))
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= 360
        for name in ("transcript", "speak", "choose"):
            assert contrast(chrome, name) >= 4.5, name  # WCAG 2.2, level AA


def contrast(chrome: Chrome, name: str) -> float:
    """The contrast of an element's text with what is behind it, as WCAG defines it."""
    script = """
        const element = document.getElementById(arguments[0]), colours = [getComputedStyle(element).color];
        for (let e = element; colours.length < 2; e = e.parentElement) {
          const background = getComputedStyle(e).backgroundColor;
          if (!background.endsWith(", 0)")) colours.push(background);
        }
        return colours.map((colour) => colour.match(/\\d+/g).slice(0, 3).map(Number));"""

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(luminance(colour) for colour in chrome.execute_script(script, name))
    return (light + 0.05) / (dark + 0.05)


def test_nothing_foreign_is_loaded(page, live_server):
    with browser(page, base(live_server)) as chrome:
        loaded = chrome.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [name for name in loaded if not name.startswith(page.removesuffix("live.html"))] == []


def test_every_control_has_a_name(page, live_server):
    with browser(page, base(live_server)) as chrome:
        for selector in ("button", "input", "meter"):
            for element in chrome.find_elements(By.CSS_SELECTOR, selector):
                assert element.accessible_name or not element.is_displayed(), element.get_attribute("outerHTML")
