from __future__ import annotations

from mgpu_llm.core.endpoint import Endpoint


def test_the_api_key_never_shows_where_an_endpoint_is_printed() -> None:
    endpoint = Endpoint(url="http://127.0.0.1:8000", api_key="secret-key", served_name="m")
    assert "secret-key" not in repr(endpoint)
    assert "http://127.0.0.1:8000" in repr(endpoint)
