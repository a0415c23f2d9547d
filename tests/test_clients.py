"""The table of docs/clients.md: each client with requests of its kinds, to TorchServe and to the proxy."""

import asyncio
import base64
import gzip
import importlib.util
import io
import shutil
import subprocess

import pytest
import requests
from conftest import SAMPLES, needs_nginx, origin, transcripts
from test_api import table

THREE_DIGITS = SAMPLES / "three-digits.wav"
AUDIO = THREE_DIGITS.read_bytes()
TEXT = transcripts("digits")["three-digits.wav"]
RAW = {"Content-Type": "application/octet-stream"}
NODE = """
const fs = require("fs"), [url, file] = process.argv.slice(1), bytes = fs.readFileSync(file), form = new FormData();
form.append("file", new Blob([bytes]), "speech.wav");
const headers = {"Content-Type": "audio/wav"};
(async () => {
  for (const sent of [{body: form}, {body: bytes, headers}]) {
    console.log(await (await fetch(url, {method: "POST", ...sent})).text());
  }
})();
"""
GO = """
package main

import ("bytes"; "fmt"; "io"; "mime/multipart"; "net/http"; "os")

func ask(kind string, body io.Reader) {
	answer, err := http.Post(os.Args[1], kind, body)
	if err != nil { panic(err) }
	text, _ := io.ReadAll(answer.Body)
	fmt.Println(string(text))
}

func main() {
	audio, _ := os.ReadFile(os.Args[2])
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	file, _ := form.CreateFormFile("file", "speech.wav")
	file.Write(audio)
	form.Close()
	ask(form.FormDataContentType(), &body)
	ask("audio/wav", bytes.NewReader(audio))
	ask("audio/wav", io.MultiReader(bytes.NewReader(audio)))  // of unknown length: chunked
}
"""


def curl(*options: str):
    def ask(url: str, folder) -> list[str]:
        (folder / "speech.gz").write_bytes(gzip.compress(AUDIO))
        command = ["curl", "-sS", "-X", "POST", url, *options]
        return [subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout]

    return ask


def by_requests(url: str, _) -> list[str]:
    sent = [{"files": {"file": AUDIO}}, {"data": AUDIO, "headers": RAW}]
    sent.append({"data": iter([AUDIO[:9000], AUDIO[9000:]]), "headers": RAW})
    return [requests.post(url, **each, timeout=300).text for each in sent]


def by_httpx(url: str, _) -> list[str]:
    import httpx

    sent = [{"files": {"file": AUDIO}}, {"content": AUDIO, "headers": RAW}]
    sent.append({"content": iter([AUDIO[:9000], AUDIO[9000:]]), "headers": RAW})
    return [httpx.post(url, **each, timeout=300).text for each in sent]


def by_aiohttp(url: str, _) -> list[str]:
    import aiohttp

    async def ask() -> list[str]:
        form, answers = aiohttp.FormData(), []
        form.add_field("file", io.BytesIO(AUDIO), filename="speech.wav")
        async with aiohttp.ClientSession() as session:
            for sent in ({"data": form}, {"data": AUDIO, "headers": RAW}):
                async with session.post(url, **sent) as answer:
                    answers.append(await answer.text())
        return answers

    return asyncio.run(ask())


def by_node(url: str, _) -> list[str]:
    command = ["node", "-e", NODE, url, THREE_DIGITS]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def by_go(url: str, folder) -> list[str]:
    program = folder / "ask.go"
    program.write_text(GO)
    command = ["go", "run", program, url, THREE_DIGITS]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def by_kserve(url: str, _) -> list[str]:
    url = url.replace("/predictions/emformer_asr", "/v1/models/emformer_asr:predict")
    sent = {"instances": [{"data": base64.b64encode(AUDIO).decode()}]}
    return requests.post(url, json=sent, timeout=300).json()["predictions"]


CLIENTS = {
    "curl": curl("-T", THREE_DIGITS),
    "curl, form": curl("-F", f"file=@{THREE_DIGITS}"),
    "curl, chunked": curl("-T", THREE_DIGITS, "-H", "Transfer-Encoding: chunked"),
    "curl, waiting": curl("-T", THREE_DIGITS, "-H", "Expect: 100-continue"),
    "curl, HTTP/1.0": curl("-T", THREE_DIGITS, "--http1.0"),
    "curl, gzip'd": curl("-T", "speech.gz", "-H", "Content-Encoding: gzip"),
    "requests": by_requests,
    "httpx": by_httpx,
    "aiohttp": by_aiohttp,
    "Node": by_node,
    "Go": by_go,
    "KServe v1": by_kserve,
}


def there(client: str) -> bool:
    name = client.split(",")[0].lower()
    return name == "kserve v1" or bool(shutil.which(name) or importlib.util.find_spec(name))


@pytest.mark.parametrize("through", ["TorchServe", pytest.param("nginx", marks=needs_nginx)])
@pytest.mark.parametrize("client", [row[0] for row in table("client", "how", "answer")])
def test_every_client_is_answered(server, tmp_path, client, through):
    if not there(client):
        pytest.skip(f"needs {client.split(',')[0]}")
    url = server.url if through == "TorchServe" else f"{origin(server)}/predictions/emformer_asr"
    answers = CLIENTS[client](url, tmp_path)
    if "gzip" in client:
        assert all("NotAudio" in answer for answer in answers)
    else:
        assert set(answers) == {TEXT}
