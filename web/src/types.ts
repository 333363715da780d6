// What the HTTP API answers. A figure that is not known is null.

export interface Engine {
  id: string;
  name: string | null;
  model: string;
  state: string;
  ready: boolean;
  progress: { phase: string | null; percent: number | null; text: string } | null;
  replicas: Replica[];
  running: number | null;
  waiting: number | null;
  tokens_per_second: number | null;
  ttft_seconds: number | null;
  itl_seconds: number | null;
  kv_cache_usage: number | null;
  prefix_cache_hit_rate: number | null;
  memory: DeviceMemory[] | null;
  quantization: string | null;
  max_model_len: number | null;
  deaths: Death[];
  // What /v1 calls it; null where the server does not serve it.
  served_name: string | null;
  // Why it failed.
  error: Refusal | null;
  // What it was last asked to do.
  operation: { name: string; state: "running" | "done" | "failed"; error: Refusal | null } | null;
}

export interface Refusal {
  reason: string;
  message: string;
}

export interface Replica {
  index: number;
  state: string;
  node: string | null;
  devices: (string | number)[] | null;
  pid: number | string | null;
  restarts: number | null;
  in_flight: number | null;
  error: Refusal | null;
}

export interface DeviceMemory {
  device: string;
  used_bytes: number | null;
  total_bytes: number | null;
}

export interface Death {
  time: string | null;
  replica: number;
  reason: string;
  message: string;
  log: string[];
}

export interface Job {
  id: string;
  name: string;
  kind: string;
  model: string;
  state: string;
  phase: string | null;
  percent: number | null;
  seconds_left: number | null;
  waiting_for: string | null;
  outputs: JobOutput[];
  error: Refusal | null;
  created_at: string | null;
  updated_at: string | null;
}

export interface JobOutput {
  name: string | null;
  format: string;
  type: string | null;
  state: string;
  bytes: number | null;
  // What was lost; null where it was not compared with its source.
  quality: { kl_mean: number | null } | null;
  error: Refusal | null;
}

export interface Machine {
  memory_bytes: number | null;
  memory_available_bytes: number | null;
  devices: { name: string; memory_bytes: number | null; memory_used_bytes: number | null }[];
  disk_free_bytes: number | null;
}

export interface Snapshot {
  time: string;
  engines: Engine[];
  jobs: Job[];
  // Before the first look at it.
  machine: Machine | null;
}

export interface Model {
  name: string;
  path: string | null;
  format: string | null;
  type: string | null;
  bytes: number | null;
  created_at: string | null;
  job: string | null;
  kind: "model" | "adapter";
  origin: string;
  aliases: string[];
}

// How far an upload is.
export interface UploadProgress {
  bytes: number;
  total_bytes: number;
  seconds_left: number | null;
}

export type Options = Record<string, unknown>;

export interface Format {
  format: string;
  types: string[];
  options: FormatOption[];
  // Why it cannot be made on this machine.
  refused: string | null;
}

export interface FormatOption {
  name: string;
  type: string | null;
  default: unknown;
  doc: string | null;
}

// One output of a quantization that is asked for.
export interface Wanted {
  format: string;
  type?: string;
  options?: Options;
}

export interface Sizes {
  // Of the files that are made; of these and of those that are there only meanwhile.
  bytes: number | null;
  disk_bytes: number | null;
  memory_bytes: number | null;
  minutes: [number, number] | null;
}

export interface OutputEstimate extends Sizes {
  format: string;
  type: string | null;
  // The mean KL divergence that this format usually has.
  quality: number | null;
}

// By the names of VLLM.Quantization.Report.
export interface Check {
  "ok?": boolean;
  findings: Finding[];
  architecture: string | null;
  method: string | null;
  kernel: string | null;
  dtype: string | null;
  max_model_len: number | null;
  capabilities: string[] | null;
  device: string | null;
}

export interface Finding {
  severity: "error" | "warning" | "info";
  reason: string;
  message: string;
  remedy: string;
}

// By the names of VLLM.Quantization.Estimate.
export interface Estimate {
  "fits?": boolean;
  max_model_len: number;
  concurrency: number;
  longest_context: number;
  max_concurrency: number | null;
  tokens_per_second: number | null;
  devices: DeviceEstimate[];
  remedies: { text: string; options: Record<string, string> | null }[];
  formats: { name: string; disk: number; memory: number; "fits?": boolean }[];
}

export interface DeviceEstimate {
  name: string;
  memory: number;
  budget: number;
  weights: number;
  adapters: number;
  draft: number;
  activations: number;
  framework: number;
  kv_cache: number;
  left: number;
  "fits?": boolean;
}

// By the names of VLLM.Quantization.Comparison.Row.
export interface ComparisonRow {
  model: string;
  format: string | null;
  bytes: number | null;
  kl_mean: number | null;
  kl_p99: number | null;
  perplexity: number | null;
  same_top: number | null;
  tokens_per_second: number | null;
  verdict: string | null;
  says: string[] | null;
  error: Refusal | null;
}
