"""What the server counts, in the text format of Prometheus."""

from deepseek_v3.inference.server.server_metrics import Histogram, ServerMetrics
from helpers.servers import running_server


def values(text: str) -> dict[str, float]:
    """The value of each sample. Every metric has its help and type in front."""
    found, described = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            described.add(line.split()[2])
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            family = name.partition("{")[0]
            assert family in described or family.rpartition("_")[0] in described
            found[name] = float(value)
    return found


def test_buckets_count_everything_up_to_their_limit() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.1, 0.05, 0.11, 1.0, 5.0):
        histogram.observe(seconds)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="0.1"} 2',
        'x_bucket{le="1.0"} 4',
        'x_bucket{le="+Inf"} 5',
        "x_sum 6.26",
        "x_count 5",
    ]


def test_gauges_and_counters_have_their_help() -> None:
    metrics = ServerMetrics()
    metrics.count_finished("length")
    text = metrics.text({"pages": ("Pages.", 3)})
    assert "# HELP pages Pages.\n# TYPE pages gauge\npages 3\n" in text
    assert 'dsv3_requests_finished_total{reason="length"} 1\n' in text
    assert text.endswith("\n")


def test_a_server_counts_tokens_times_and_statuses() -> None:
    with running_server() as server, server.client() as client:
        body = {"prompt": ["the cat", "ü"], "max_tokens": 5, "temperature": 0}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert client.post("/v1/completions", json={"foo": 1}).status_code == 400
        found = values(client.get("/metrics").text)
    assert found["dsv3_prompt_tokens_total"] == usage["prompt_tokens"]
    assert found["dsv3_generated_tokens_total"] == 10
    assert found["dsv3_time_to_first_token_seconds_count"] == 2
    assert found["dsv3_time_between_tokens_seconds_count"] == 8
    assert found['dsv3_requests_finished_total{reason="length"}'] == 2
    assert found['dsv3_http_responses_total{status="200"}'] == 1
    assert found['dsv3_http_responses_total{status="400"}'] == 1
    assert found["dsv3_requests_running"] == found["dsv3_requests_waiting"] == found["dsv3_requests_open"] == 0
    assert found["dsv3_cache_pages"] == found["dsv3_cache_pages_free"] == 64
