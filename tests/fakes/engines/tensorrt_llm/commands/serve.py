# SPDX-License-Identifier: Apache-2.0
"""`python -m tensorrt_llm.commands.serve serve MODEL`."""

import sys

from stand_in import StandIn, parser, serve

FLAGS = {
    **dict.fromkeys(("host", "port", "max_batch_size", "max_seq_len", "max_num_tokens"), "one"),
    **dict.fromkeys(("backend", "tp_size", "kv_cache_free_gpu_memory_fraction"), "one"),
    "trust_remote_code": "switch",
}

if __name__ == "__main__":
    assert sys.argv[1] == "serve"
    options = parser(FLAGS, "_").parse_args(sys.argv[3:])
    ways = StandIn(
        key="", prefix="trtllm_", stop_name="stop_reason", max_model_len=None, tells_token_ids=False
    )
    serve(options, ways)
