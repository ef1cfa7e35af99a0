"""More than it can do: a full queue, clients that are killed, and the end."""

import signal
import subprocess
import sys
import textwrap
import threading

import openai
import pytest
from hypergen import KEY, Server, serving
from openai import OpenAI

# A picture that takes as long as one of this model can: nobody waits for it.
LONG = {"num_inference_steps": 150, "n": 10}
STEPS = 'hypergen_stage_duration_seconds_count{stage="step"}'


def background(server, answers, **body):
    def ask():
        try:
            answers.append(server.post(prompt="x", size="auto", **body).status_code)
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def kill_later(server, **body):
    """A client in a process of its own, to be killed."""
    script = f"""
        import requests
        requests.post({server.url + "/v1/images/generations"!r}, headers={server.headers!r},
                      json={{"prompt": "x", "size": "auto", **{body!r}}})
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])


def test_a_full_queue_is_a_rate_limit():
    with serving("--max-queue-size", "2") as server:
        clients = [kill_later(server, **LONG)]
        server.until("one runs", lambda health: health["in_progress"] == 1)
        answers = []
        threads = [background(server, answers, num_inference_steps=1) for _ in range(2)]
        server.until("two wait", lambda health: health["queue_size"] == 2)
        client = OpenAI(api_key=KEY, base_url=server.url + "/v1", max_retries=0)
        with pytest.raises(openai.RateLimitError) as error:
            client.images.generate(prompt="x")
        assert (error.value.type, error.value.code) == ("rate_limit_exceeded", "queue_full")
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert server.health()["queue_size"] == 2
        for process in clients:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]


def test_a_killed_client_costs_one_step_at_most():
    with serving() as server:
        for _ in range(10):
            running = kill_later(server, **LONG)
            server.until("it runs", lambda health: health["in_progress"] == 1)
            waiting = kill_later(server, **LONG)
            server.until("one waits", lambda health: health["queue_size"] == 1)
            waiting.kill()
            server.until("its place is free", lambda health: health["queue_size"] == 0)
            running.kill()
            running.wait()
            steps = server.metric(STEPS)
            server.until("it has stopped", lambda health: health["in_progress"] == 0)
            # The step that ran, and one more where the news came just after the next had begun.
            assert server.metric(STEPS) - steps <= 2
            waiting.wait()
            assert server.post(prompt="x", size="auto", num_inference_steps=1).status_code == 200
        assert server.metric('hypergen_clients_left_total{while="waiting"}') == 10
        assert server.metric('hypergen_clients_left_total{while="running"}') == 10


def test_a_time_out_of_the_package_does_not_cost_three_generations():
    with serving() as server:
        client = OpenAI(api_key=KEY, base_url=server.url + "/v1", max_retries=2, timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(prompt="x", size="auto", n=10, extra_body={"num_inference_steps": 150})
        server.until("all have stopped", lambda health: health["in_progress"] == health["queue_size"] == 0)
        assert server.metric(STEPS) < 1500, "less than one of the three was drawn to its end"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_finished_before_the_end(signum):
    server = Server("--shutdown-timeout", "5m")
    answers = []
    running = background(server, answers, num_inference_steps=150)
    server.until("it runs", lambda health: health["in_progress"] == 1)
    assert server.stop(signum) == 0
    running.join()
    assert answers == [200]


def test_past_the_time_out_everybody_is_told():
    server = Server("--shutdown-timeout", "100ms")
    answers = []
    threads = [background(server, answers, **LONG)]
    server.until("it runs", lambda health: health["in_progress"] == 1)
    threads.append(background(server, answers, **LONG))
    server.until("one waits", lambda health: health["queue_size"] == 1)
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    assert answers == [503, 503]


def test_a_second_signal_ends_it_at_once():
    server = Server("--shutdown-timeout", "1h")
    answers = []
    thread = background(server, answers, **LONG)
    server.until("it runs", lambda health: health["in_progress"] == 1)
    server.process.send_signal(signal.SIGTERM)
    while not any("shutting down" in line for line in server.log):
        pass
    assert server.stop(signal.SIGINT) == 130
    thread.join()


def test_it_says_how_it_starts_and_keeps_keys_and_prompts_to_itself():
    with serving() as server:
        server.post(prompt="a secret wish", size="auto", num_inference_steps=1)
        server.get("/v1/models")
    log = "\n".join(server.log)
    assert KEY not in log and "secret wish" not in log
    assert '"message":"ready"' in log and "emoji" in log
    with serving("--log-prompts") as server:
        server.post(prompt="a public wish", size="auto", num_inference_steps=1)
    assert "a public wish" in "\n".join(server.log)


def test_it_warns_when_anybody_may_come():
    with serving("--host", "0.0.0.0", key=None) as server:
        pass
    assert any('"level":"WARN"' in line and "ANYBODY" in line for line in server.log)


def test_what_it_cannot_start_with_is_one_line():
    for args, word in [
        (["/no/such/model"], "/no/such/model"),
        (["--device", "cuda"], "--device"),
        (["--config", "/no/such.toml"], "/no/such.toml"),
        (["--image-dir", "/proc/nowhere"], "--image-dir"),
    ]:
        with pytest.raises(RuntimeError) as error:
            Server(*args)
        lines = str(error.value).splitlines()
        assert any(line.startswith("error: ") and word in line for line in lines), lines
