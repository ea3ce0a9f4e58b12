# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm.entrypoints.openai.api_server`."""

import os

from stand_in import StandIn, parser, serve

FLAGS = {
    **dict.fromkeys(("model", "served_model_name", "host", "port"), "one"),
    **dict.fromkeys(("uvicorn_log_level", "max_log_len", "max_num_seqs", "max_model_len"), "one"),
    **dict.fromkeys(("max_num_batched_tokens", "dtype", "kv_cache_memory_bytes"), "one"),
    **dict.fromkeys(("block_size", "tensor_parallel_size", "gpu_memory_utilization"), "one"),
    "hf_overrides": "one",
    "middleware": "list",
    "enable_prompt_tokens_details": "switch",
    "trust_remote_code": "switch",
    "enable_prefix_caching": "either",
    "enable_chunked_prefill": "either",
    "enforce_eager": "either",
}

if __name__ == "__main__":
    options = parser(FLAGS, "-").parse_args()
    ways = StandIn(
        key=os.environ["VLLM_API_KEY"],
        prefix="vllm:",
        stop_name="stop_reason",
        max_model_len=int(options.max_model_len or 512),
        tells_token_ids=True,
    )
    serve(options, ways)
