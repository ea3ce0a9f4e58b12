// SPDX-License-Identifier: Apache-2.0
// One launch, written for the command line, for curl and for Python.

import { endpoint } from "./api.js";

const OPTIONS = {
  model_engine: "--model-engine",
  model_name: "--model-name",
  model_type: "--model-type",
  model_size_in_billions: "--size-in-billions",
  model_format: "--model-format",
  quantization: "--quantization",
  model_path: "--model-path",
  model_uid: "--model-uid",
  replica: "--replica",
  n_gpu: "--n-gpu",
  context_length: "--context-length",
  worker_ip: "--worker-ip",
  download_hub: "--download-hub",
  min_replicas: "--min-replicas",
  max_replicas: "--max-replicas",
  idle_timeout: "--idle-timeout",
  trust_remote_code: "--trust-remote-code",
};

/** Options that are not written as a name and a value. */
const SPECIAL = {
  envs: (pairs) => Object.entries(pairs).map(([name, text]) => `--env ${quoted(name)} ${quoted(text)}`),
  gpu_idx: (indices) => [`--gpu-idx ${quoted(indices.join(","))}`],
  virtual_env_packages: (names) => names.map((name) => `--virtual-env-package ${quoted(name)}`),
  enable_thinking: (isOn) => [isOn ? "--enable-thinking" : "--disable-thinking"],
  autoload: () => ["--autoload"],
};

/** @param {object} launch the body of `POST /v1/models` */
export function snippets(launch, { hasKey }) {
  return { CLI: cli(launch), curl: curl(launch, hasKey), Python: python(launch, hasKey) };
}

const quoted = (text) =>
  /^[\w./:@%+=,-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;

function cli(launch) {
  const words = ["xinference launch", `--endpoint ${quoted(endpoint)}`];
  for (const [name, value] of Object.entries(launch)) {
    if (name in SPECIAL) {
      words.push(...SPECIAL[name](value));
      continue;
    }
    let text = typeof value === "string" ? value : JSON.stringify(value);
    if (name === "n_gpu" && value === null) text = "none";
    words.push(`${OPTIONS[name] ?? `--${name}`} ${quoted(text)}`);
  }
  return words.join(" \\\n    ");
}

function curl(launch, hasKey) {
  const key = hasKey ? ' \\\n    -H "Authorization: Bearer $XINFERENCE_API_KEY"' : "";
  return `curl ${endpoint}/v1/models${key} \\\n    -d ${quoted(JSON.stringify(launch, null, 2))}`;
}

function python(launch, hasKey) {
  const key = hasKey ? ', api_key=os.environ["XINFERENCE_API_KEY"]' : "";
  const names = Object.entries(launch).map(([name, value]) => `    ${name}=${literal(value)},`);
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from xinference.client import Client",
    "",
    `client = Client(${literal(endpoint)}${key})`,
    "uid = client.launch_model(",
    ...names,
    ")",
  ].join("\n");
}

function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value).map(([key, inner]) => `${literal(key)}: ${literal(inner)}`);
  return `{${pairs.join(", ")}}`;
}
