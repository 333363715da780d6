import { useState } from "preact/hooks";
import { ask, post } from "../api";
import { duration, file, moment, number, short, small } from "../format";
import { useLive } from "../live";
import { Gauge } from "../parts/bars";
import { Dialog } from "../parts/dialog";
import { Check } from "../parts/fields";
import { LiveLog } from "../parts/log";
import { attempt, notify } from "../parts/notices";
import { State } from "../parts/state";
import { link } from "../route";
import type { Job, JobOutput } from "../types";
import { StartDialog } from "./start";

const AGAIN = ["failed", "cancelled", "interrupted"];
const ENDED = [...AGAIN, "done"];

export function JobsPage() {
  const { now } = useLive();
  const jobs = [...(now?.jobs ?? [])].sort((a, b) => (b.created_at ?? "").localeCompare(a.created_at ?? ""));

  return (
    <>
      <div class="head">
        <h1 tabIndex={-1}>Quantize</h1>
        <a class="button primary" href={link("quantize", "new")}>
          New job
        </a>
      </div>
      {now === null && <p class="muted">Waiting for the server…</p>}
      {now?.jobs.length === 0 && <p class="card empty">There is no job. A job makes a model in other formats, compares each with its source, and gives it a name.</p>}
      <ul class="cards">
        {jobs.map((job) => (
          <li key={job.id}>
            <JobCard job={job} />
          </li>
        ))}
      </ul>
    </>
  );
}

function JobCard({ job }: { job: Job }) {
  const [log, setLog] = useState(false);
  const [deleting, setDeleting] = useState(false);
  const path = `api/v1/quantize/jobs/${encodeURIComponent(job.id)}`;
  const ended = ENDED.includes(job.state);
  const done = job.outputs.filter((output) => output.state === "done").length;

  return (
    <article class="card job">
      <div class="head">
        <div>
          <h2>
            {job.name} <State state={job.state} />
          </h2>
          <p class="muted">
            {job.kind} of <span title={job.model}>{short(job.model)}</span> · {moment(job.created_at)}
            {job.outputs.length > 0 && ` · ${done} of ${job.outputs.length} done`}
          </p>
        </div>
        <div class="actions">
          {!ended && (
            <button type="button" onClick={() => attempt(post(`${path}/cancel`), `${job.name} is cancelled.`)}>
              Cancel
            </button>
          )}
          {AGAIN.includes(job.state) && (
            <button type="button" onClick={() => attempt(post(`${path}/retry`), `${job.name} goes on.`)}>
              Retry
            </button>
          )}
          <button type="button" aria-expanded={log} onClick={() => setLog(!log)}>
            Log
          </button>
          {ended && (
            <button type="button" class="danger" onClick={() => setDeleting(true)}>
              Delete…
            </button>
          )}
        </div>
      </div>
      {!ended && <Progress job={job} />}
      {job.error && <p class="note bad">{job.error.message}</p>}
      {job.outputs.length > 0 && <Outputs outputs={job.outputs} />}
      {log && <LiveLog path={`${path}/log`} label={`Log of ${job.name}`} />}
      {deleting && <DeleteDialog job={job} path={path} onClose={() => setDeleting(false)} />}
    </article>
  );
}

function Progress({ job }: { job: Job }) {
  const text = [
    job.waiting_for ? `waits for ${job.waiting_for}` : (job.phase ?? job.state),
    job.percent !== null && `${number(job.percent)} %`,
    job.seconds_left !== null && `${duration(job.seconds_left)} left`,
  ]
    .filter(Boolean)
    .join(" · ");
  return (
    <div class="loading">
      <Gauge role="progressbar" label={`Progress of ${job.name}`} share={job.percent === null ? null : job.percent / 100} text={text} />
      <p class="muted">{text}</p>
    </div>
  );
}

function Outputs({ outputs }: { outputs: JobOutput[] }) {
  const [deploying, setDeploying] = useState<string | null>(null);
  return (
    <>
      <ul class="outputs">
        {outputs.map((output, n) => (
          <li key={`${output.name} ${n}`}>
            <State state={output.state} />
            <span class="path">{output.name ?? [output.format, output.type].filter(Boolean).join(" ")}</span>
            <span class="muted">
              {[output.bytes !== null && file(output.bytes), output.quality && `KL ${small(output.quality.kl_mean)}`].filter(Boolean).join(" · ")}
            </span>
            {output.error && <span class="bad-text">{output.error.message}</span>}
            {output.state === "done" && output.name && (
              <button type="button" onClick={() => setDeploying(output.name)}>
                Deploy…
              </button>
            )}
          </li>
        ))}
      </ul>
      {deploying && <StartDialog model={deploying} onClose={() => setDeploying(null)} />}
    </>
  );
}

function DeleteDialog({ job, path, onClose }: { job: Job; path: string; onClose: () => void }) {
  const [outputs, setOutputs] = useState(false);
  const remove = async () => {
    await ask(`${path}?outputs=${outputs}`, { method: "DELETE" });
    notify(`The job ${job.name} is deleted.`);
  };

  return (
    <Dialog title={`Delete the job ${job.name}?`} action="Delete" danger onClose={onClose} onAction={remove}>
      <p>Its record and its log go. What it has made stays, unless it is to go, too.</p>
      <Check label="Delete the models that it has made" checked={outputs} onChange={setOutputs} />
    </Dialog>
  );
}
