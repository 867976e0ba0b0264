"""Names from answers: parsing, filtering, storing, replaying; a chat endpoint started here; tiny random models."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from thrifty.errors import DataError, KnobError, StoreError, ToolError
from thrifty.fewshot import one_class as oc
from thrifty.fewshot.one_class import AnswerFile, ChatEndpoint, LocalModel, clean, collect, parse_answer
from thrifty.fewshot.preprocess import InputError

# ---- parsing and filtering


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1. wolf\n2. fox\n", ["wolf", "fox"]),
        (
            "Of course! Here they are:\n\n1) A **wolf** - grey\n2) The fox (red)\n\nI hope this helps, friend.",
            ["wolf", "fox"],
        ),
        ("- wolf\n* fox\n• jackal", ["wolf", "fox", "jackal"]),
        ("wolf, fox; and jackal.", ["wolf", "fox", "jackal"]),
        ('["wolf", "fox", 3]', ["wolf", "fox"]),
        ('Sure: ["wolf", "fox"] as asked', ["wolf", "fox"]),
        ("1. this one is much too long to be any name\n2. fox", ["fox"]),
        ("1. Saint-Bernard\n2. 'T-shirt'", ["Saint-Bernard", "T-shirt"]),
        ("", []),
        ("\n \n", []),
        ("[broken, json", ["[broken", "json"]),
    ],
)
def test_answers_of_many_shapes(text, names):
    assert parse_answer(text) == names


def test_what_is_the_target_by_another_word_is_dropped_with_the_reason():
    found = clean("cat", ["Cats", "THE cat", "tabby cat", "lynx", "lynxes", "moggy", "dog", "fox"], 2, also=["moggies"])
    assert found.kept == ("lynx", "dog")
    assert dict(found.dropped) == {
        "Cats": "the target", "THE cat": "the target", "tabby cat": "a kind of the target", "lynxes": "repeated",
        "moggy": "a word for, above, below or a part of the target", "fox": "more than 2",
    }  # fmt: skip
    with pytest.raises(InputError):
        clean("cat", [], 0)


class Around:
    """Stands in for WordNet."""

    def words_around(self, label):
        return {"feline", "whisker", "Siamese"} if label == "cat" else set()


def test_wordnet_names_synonyms_hypernyms_kinds_and_parts():
    assert clean("cat", ["felines", "Whiskers", "siamese", "dog"], wordnet=Around()).kept == ("dog",)


def test_negatives_with_the_same_embedding_are_found():
    target = np.array([1.0, 0.0, 0.0])
    found = oc.drop_same(target, np.array([[5.0, 0.1, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert found.tolist() == [False, True, True]


def test_random_names_are_drawn_by_the_seed_without_the_target():
    names = [f"name {i}" for i in range(30)]
    first = oc.random_names("name 3", names, 29, np.random.default_rng(0))
    assert sorted(first.kept) == sorted(set(names) - {"name 3"})
    assert first.kept == oc.random_names("name 3", names, 29, np.random.default_rng(0)).kept
    assert first.kept != oc.random_names("name 3", names, 29, np.random.default_rng(1)).kept


# ---- stored answers


class Parrot:
    """A source that counts what it is asked."""

    settings = {"kind": "test", "model": "parrot"}  # noqa: RUF012

    def __init__(self, fail_after=99):
        self.asked, self.fail_after = [], fail_after

    def answer(self, prompts):
        if len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [f"1. not {p}" for p in prompts]


def test_what_was_answered_is_not_asked_again_and_replays_without_the_source(tmp_path):
    path, parrot = tmp_path / "new" / "answers.json", Parrot()
    file = AnswerFile(path, parrot.settings, "{label}?")
    first = collect(["a", "b", "a"], file, parrot)
    assert first == {"a": "1. not a?", "b": "1. not b?"}
    again = collect(["b", "c"], AnswerFile(path, parrot.settings, "{label}?"), parrot)
    assert parrot.asked == ["a?", "b?", "c?"]
    assert again["b"] == first["b"]
    replayed = AnswerFile(path)  # says by itself what was asked of whom
    assert collect(["a", "c"], replayed) == {"a": "1. not a?", "c": "1. not c?"}
    assert replayed.negatives("a").kept == ("not a?",)
    assert replayed.negatives("a").source == "parrot"
    with pytest.raises(InputError, match="no answer for 2 label"):
        collect(["a", "x", "y"], replayed)
    with pytest.raises(InputError, match="no answer for 'x'"):
        replayed.negatives("x")


def test_an_interrupted_collection_goes_on(tmp_path):
    path, parrot = tmp_path / "a.json", Parrot(fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        collect("abcdefg", AnswerFile(path, parrot.settings, "{label}"), parrot, batch=2)
    seen = []
    more = Parrot()
    collect(
        "abcdefg", AnswerFile(path, more.settings, "{label}"), more, batch=2, progress=lambda *now: seen.append(now)
    )
    assert more.asked == ["e", "f", "g"]
    assert seen == [(2, 3), (3, 3)]
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_belongs_to_one_prompt_and_one_source(tmp_path):
    path = tmp_path / "a.json"
    AnswerFile(path, {"model": "one"}, "{label}?").add({"a": "b"})
    with pytest.raises(StoreError, match=r"another source.*another file"):
        AnswerFile(path, {"model": "two"})
    with pytest.raises(StoreError, match="another prompt"):
        AnswerFile(path, prompt="{label}!")
    for broken in ("{", '{"schema": 9, "asked": {}, "answers": {}}', "[]", '{"schema": 1}'):
        path.write_text(broken)
        with pytest.raises(StoreError, match="not a file of answers"):
            AnswerFile(path)


# ---- an endpoint


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's script says: a status, or a body."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        turn = self.server.script.pop(0) if self.server.script else 200
        if turn == "hang":
            self.server.gate.wait(5)
            turn = 500
        status, text = (200, turn) if isinstance(turn, str) else (turn, None)
        if text is None:
            said = f"1. not {body['messages'][0]['content']}"
            text = json.dumps({"choices": [{"message": {"content": said}}]}) if status == 200 else "no"
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "7")
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client has hung up
            self.wfile.write(text.encode())

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.seen, http.script, http.gate = [], [], threading.Event()
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        http.url = f"http://127.0.0.1:{http.server_port}/v1"
        yield http
        http.gate.set()
        http.shutdown()


def endpoint(server, waits=None, **more):
    return ChatEndpoint(server.url, "tiny", sleep=(waits if waits is not None else []).append, **more)


def test_the_endpoint_is_asked_as_openai_is(server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    found = endpoint(server, seed=3, max_tokens=50)
    assert found.answer(["a", "b"]) == ["1. not a", "1. not b"]
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-7"
    assert body == {
        "model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0.0, "max_tokens": 50, "seed": 3
    }  # fmt: skip
    file = AnswerFile(tmp_path / "a.json", found.settings, "{label}")
    collect(["cat"], file, found)
    assert "secret-7" not in file.path.read_text() + repr(found)
    assert AnswerFile(file.path, found.settings).answers == {"cat": "1. not cat"}


def test_without_a_key_none_is_sent(server):
    endpoint(server).answer(["a"])
    assert "Authorization" not in server.seen[0][1]


def test_what_may_pass_is_tried_again(server):
    server.script = [503, 429, 200]
    waits = []
    assert endpoint(server, waits).answer(["a"]) == ["1. not a"]
    assert waits == [1.0, 7.0]  # the second as the server says


@pytest.mark.parametrize(
    ("script", "words", "requests"),
    [
        ([401], "OPENAI_API_KEY", 1), ([404], "ends in /v1", 1), ([400], "model's name", 1),
        ([500] * 9, "try again later", 3), ([429] * 9, "quota", 3), ([302], "not followed", 1),
        (["<html>"], "chat completion", 1), (['{"choices": []}'], "chat completion", 1),
        (['{"choices": [{"message": {"content": null}}]}'], "no text", 1), (["x" * (4 * 2**20 + 1)], "more than", 1),
    ],
)  # fmt: skip
def test_every_failure_says_what_to_do(server, script, words, requests):
    server.script = list(script)
    with pytest.raises(ToolError, match=words):
        endpoint(server, retries=2).answer(["a"])
    assert len(server.seen) == requests


def test_a_server_that_hangs_or_is_not_there(server):
    server.script = ["hang", "hang"]
    with pytest.raises(ToolError, match="timeout_s"):
        endpoint(server, retries=1, timeout_s=0.05).answer(["a"])
    assert len(server.seen) == 2
    with pytest.raises(ToolError, match="is the server running"):
        ChatEndpoint("http://127.0.0.1:9/v1", "tiny", retries=0).answer(["a"])


def test_bad_addresses_are_refused_and_the_key_stays_off_plain_http(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-7")
    with pytest.raises(KnobError, match="plain http") as refusal:
        ChatEndpoint("http://example.com/v1", "m")
    assert "secret" not in str(refusal.value)
    ChatEndpoint("https://example.com/v1", "m")
    monkeypatch.delenv("OPENAI_API_KEY")
    ChatEndpoint("http://example.com/v1", "m")
    for url in ("ftp://x", "example.com", "file:///etc/passwd"):
        with pytest.raises(KnobError, match="http"):
            ChatEndpoint(url, "m")
    with pytest.raises(KnobError, match="retries"):
        ChatEndpoint("https://example.com", "m", retries=-1)


# ---- a local model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama with a tokenizer of letters, in a folder."""
    torch = pytest.importorskip("torch")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama")
    letters = {c: i for i, c in enumerate(["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz ,.\n"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_answers_the_same_every_time(llama):
    model = LocalModel(llama, max_new_tokens=6, batch=2)
    prompts = ["cat and dog", "fox", "a tiger,"]
    first = model.answer(prompts)
    assert len(first) == 3
    assert any(first)
    assert LocalModel(llama, max_new_tokens=6, batch=2).answer(prompts) == first
    assert LocalModel(llama, max_new_tokens=6, batch=1).answer(prompts[::-1]) == first[::-1]  # padding changes nothing
    assert model.settings["model"] == llama.name


def test_sampling_depends_on_seed_and_prompt_only(llama):
    def ask(prompts, seed=0):
        return LocalModel(llama, max_new_tokens=8, temperature=2.0, seed=seed).answer(prompts)

    first = ask(["cat", "dog"])
    assert ask(["dog", "cat"]) == first[::-1]
    assert ask(["cat", "dog"], seed=1) != first


def test_an_answer_ends_before_the_stop(llama):
    whole = LocalModel(llama, max_new_tokens=8).answer(["cat"])[0]
    assert len(whole) > 1
    assert (
        LocalModel(llama, max_new_tokens=8, stop=whole[1]).answer(["cat"])[0] == whole[: whole.index(whole[1])].strip()
    )


def test_a_chat_template_is_used_unless_declined(llama, tmp_path):
    import shutil

    folder = tmp_path / "chat"
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}user {{ m['content'] }}.{% endfor %}")
    templated = LocalModel(folder, max_new_tokens=6)
    assert templated.answer(["cat"]) == LocalModel(llama, max_new_tokens=6).answer(["user cat."])
    assert LocalModel(folder, max_new_tokens=6, chat=False).answer(["cat"]) == LocalModel(
        llama, max_new_tokens=6
    ).answer(["cat"])


def test_no_model_and_bad_knobs_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        LocalModel(tmp_path / "nothing").answer(["a"])
    with pytest.raises(DataError, match="no causal language model"):
        LocalModel(tmp_path).answer(["a"])
    with pytest.raises(KnobError, match="max_new_tokens"):
        LocalModel(tmp_path, max_new_tokens=0)


def test_the_answers_of_the_experiment_replay_without_a_model():
    path = Path(__file__).resolve().parents[4] / "experiments" / "one_class" / "answers_smollm2.json"
    file = AnswerFile(path)
    assert file.asked["source"]["model"].startswith("SmolLM2-135M")
    assert file.asked["prompt"] == oc.EXAMPLES
    labels = sorted(file.answers)
    assert len(labels) > 500
    assert collect(labels, file) == file.answers
    assert {"lion", "leopard", "jaguar"} <= {*file.negatives("tiger").kept}
    assert all("\n" not in answer for answer in file.answers.values())
    with pytest.raises(StoreError, match="another source"):
        AnswerFile(path, {"model": "another"})
