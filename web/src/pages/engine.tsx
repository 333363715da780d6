import { useState } from "preact/hooks";
import { post } from "../api";
import { latency, memory, moment, number, percent, UNKNOWN } from "../format";
import type { Sample } from "../live";
import { useLive } from "../live";
import { Gauge } from "../parts/bars";
import { TimeChart } from "../parts/charts";
import { Figure } from "../parts/figure";
import { Lines, LiveLog } from "../parts/log";
import { attempt } from "../parts/notices";
import { State } from "../parts/state";
import { Table } from "../parts/table";
import { link } from "../route";
import type { Engine, Replica } from "../types";
import type { Asked } from "./engine-dialogs";
import { EngineDialog } from "./engine-dialogs";
import { Loading, title } from "./engines";

export function EnginePage({ id }: { id: string }) {
  const { now, history } = useLive();
  const engine = now?.engines.find((one) => one.id === id);

  if (!engine) {
    return (
      <>
        <h1 tabIndex={-1}>Engine</h1>
        <p class="muted">
          {now ? "It is not there any more. " : "Waiting for the server… "}
          <a href={link("engines")}>All engines</a>
        </p>
      </>
    );
  }

  const path = `api/v1/engines/${encodeURIComponent(id)}`;
  return (
    <>
      <Head engine={engine} path={path} />
      {engine.state === "loading" && <Loading engine={engine} />}
      {engine.error && <p class="note bad">{engine.error.message}</p>}
      {engine.operation?.error && (
        <p class="note bad">
          The last order, {engine.operation.name}, failed: {engine.operation.error.message}
        </p>
      )}
      <dl class="figures card">
        <Figure name="running" value={number(engine.running)} />
        <Figure name="waiting" value={number(engine.waiting)} />
        <Figure name="quantization" value={engine.quantization ?? "plain"} />
        <Figure name="context" value={engine.max_model_len === null ? UNKNOWN : `${number(engine.max_model_len)} tokens`} />
        <Figure name="in /v1" value={engine.served_name ?? "not served"} />
      </dl>
      <Charts samples={history.get(id) ?? []} />
      <Replicas replicas={engine.replicas} path={path} />
      {!!engine.memory?.length && <Memory engine={engine} />}
      {engine.deaths.length > 0 && <Deaths engine={engine} />}
      <section>
        <h2>Log</h2>
        <LiveLog path={`${path}/log?lines=200`} label="Log of the engine" />
      </section>
    </>
  );
}

function Head({ engine, path }: { engine: Engine; path: string }) {
  const [asked, setAsked] = useState<Asked | null>(null);
  const name = title(engine);
  const drained = ["draining", "drained"].includes(engine.state);
  const order = (what: string, done: string) => attempt(post(`${path}/${what}`), done);

  return (
    <>
      <div class="head">
        <div>
          <h1 tabIndex={-1}>
            {name} <State state={engine.state} />
          </h1>
          <p class="muted path">{engine.model}</p>
        </div>
        <div class="actions">
          {engine.served_name && (
            <a class="button primary" href={link("try", engine.served_name)}>
              Try
            </a>
          )}
          {drained ? (
            <button type="button" onClick={() => order("resume", `${name} takes requests again.`)}>
              Resume
            </button>
          ) : (
            <button type="button" onClick={() => order("drain", `${name} finishes what it has, and takes nothing new.`)}>
              Drain
            </button>
          )}
          <button type="button" onClick={() => order("restart", `${name} is started again.`)}>
            Restart
          </button>
          <button type="button" onClick={() => setAsked("reload")}>
            Reload…
          </button>
          <button type="button" onClick={() => setAsked("scale")}>
            Scale…
          </button>
          <button type="button" class="danger" onClick={() => setAsked("stop")}>
            Stop…
          </button>
        </div>
      </div>
      {asked && <EngineDialog asked={asked} engine={engine} path={path} onClose={() => setAsked(null)} />}
    </>
  );
}

function Charts({ samples }: { samples: Sample[] }) {
  const times = samples.map((sample) => sample.time);
  const line = (name: string, figure: keyof Sample) => ({ name, values: samples.map((sample) => sample[figure]) });

  return (
    <section class="charts" aria-label="Figures over time">
      <TimeChart title="Tokens a second" times={times} series={[line("tokens/s", "tokens")]} show={number} />
      <TimeChart title="Requests" times={times} series={[line("running", "running"), line("waiting", "waiting")]} show={number} />
      <TimeChart title="Time to first token" times={times} series={[line("TTFT", "ttft")]} show={latency} />
      <TimeChart title="Between tokens" times={times} series={[line("ITL", "itl")]} show={latency} />
      <TimeChart title="KV cache in use" times={times} series={[line("KV cache", "kvCache")]} show={percent} top={1} />
      <TimeChart title="Prefix cache hits" times={times} series={[line("hits", "prefixHits")]} show={percent} top={1} />
    </section>
  );
}

function Replicas({ replicas, path }: { replicas: Replica[]; path: string }) {
  const order = (what: string, { index }: Replica) => attempt(post(`${path}/${what}`, { replica: index }), `Replica ${index}: ${what}.`);
  return (
    <section>
      <h2>Replicas</h2>
      <Table label="Replicas" columns={["No.", "State", ">In flight", ">Restarts", "Devices", "Node", ">Process", ...(replicas.length > 1 ? [""] : [])]}>
        <tbody>
          {replicas.map((replica) => (
            <tr key={replica.index}>
              <th scope="row">{replica.index}</th>
              <td>
                <State state={replica.state} />
              </td>
              <td class="right">{number(replica.in_flight)}</td>
              <td class="right">{number(replica.restarts)}</td>
              <td>{replica.devices?.join(", ") || UNKNOWN}</td>
              <td>{replica.node ?? UNKNOWN}</td>
              <td class="right">{replica.pid ?? UNKNOWN}</td>
              {replicas.length > 1 && (
                <td>
                  <div class="actions end">
                    {(replica.state === "drained" ? ["resume", "restart"] : ["drain", "restart"]).map((what) => (
                      <button key={what} type="button" aria-label={`${what} replica ${replica.index}`} onClick={() => order(what, replica)}>
                        {what}
                      </button>
                    ))}
                  </div>
                </td>
              )}
            </tr>
          ))}
        </tbody>
      </Table>
    </section>
  );
}

function Memory({ engine }: { engine: Engine }) {
  return (
    <section>
      <h2>Memory</h2>
      <ul class="card levels">
        {engine.memory!.map(({ device, used_bytes: used, total_bytes: total }) => (
          <li class="level" key={device}>
            <p>
              <span class="muted">{device}</span>{" "}
              <b>
                {memory(used)} of {memory(total)}
              </b>
            </p>
            <Gauge label={`Memory of ${device}`} share={used === null || !total ? null : used / total} text={`${memory(used)} of ${memory(total)}`} />
          </li>
        ))}
      </ul>
    </section>
  );
}

function Deaths({ engine: { deaths, replicas } }: { engine: Engine }) {
  return (
    <section>
      <h2>Deaths</h2>
      <ul class="card plain-list">
        {deaths.map((death, n) => (
          <li key={`${death.time} ${n}`}>
            <details>
              <summary>
                <span class="muted">
                  {moment(death.time)}
                  {replicas.length > 1 && ` · replica ${death.replica}`}
                </span>{" "}
                <span class="bad-text">{death.message}</span>
              </summary>
              <Lines lines={death.log} label="The last lines of its log" empty="It left no log." />
            </details>
          </li>
        ))}
      </ul>
    </section>
  );
}
