const TONES: Record<string, string> = {
  ready: "good",
  done: "good",
  loading: "busy",
  starting: "busy",
  restarting: "busy",
  stopping: "warn",
  queued: "quiet",
  waiting: "quiet",
  stopped: "quiet",
  cancelled: "quiet",
  draining: "warn",
  drained: "warn",
  sleeping: "warn",
  interrupted: "warn",
  dead: "bad",
  failed: "bad",
};

// The state of an engine, a replica, a job or an output.
export function State({ state }: { state: string }) {
  return <span class={`state ${TONES[state] ?? "busy"}`}>{state}</span>;
}
