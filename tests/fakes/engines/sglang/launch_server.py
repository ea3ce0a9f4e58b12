# SPDX-License-Identifier: Apache-2.0
"""`python -m sglang.launch_server`."""

from stand_in import StandIn, parser, serve

FLAGS = {
    **dict.fromkeys(("model_path", "served_model_name", "host", "port", "api_key"), "one"),
    **dict.fromkeys(("log_level", "max_running_requests", "context_length", "dtype"), "one"),
    **dict.fromkeys(("chunked_prefill_size", "page_size", "device", "tp_size"), "one"),
    "enable_metrics": "switch",
    "enable_cache_report": "switch",
    "trust_remote_code": "switch",
    "disable_radix_cache": "switch",
}

if __name__ == "__main__":
    options = parser(FLAGS, "-").parse_args()
    ways = StandIn(
        key=options.api_key,
        prefix="sglang:",
        stop_name="matched_stop",
        max_model_len=int(options.context_length or 512),
        tells_token_ids=False,
    )
    serve(options, ways)
