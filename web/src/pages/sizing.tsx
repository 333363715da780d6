import { useState } from "preact/hooks";
import { message, post } from "../api";
import { file, memory, number, UNKNOWN } from "../format";
import { Stack } from "../parts/bars";
import { TextField } from "../parts/fields";
import { Figure } from "../parts/figure";
import type { Draft } from "../parts/options";
import { NO_OPTIONS, OptionFields, options } from "../parts/options";
import { Table } from "../parts/table";
import type { Check, DeviceEstimate, Estimate, Finding } from "../types";
import { useModels } from "../use-models";

interface Answer {
  check: Check | null;
  estimate: Estimate | null;
  refused: string[];
}

const NOTHING: Answer = { check: null, estimate: null, refused: [] };

// Whether a model would run, and what it takes, before anything is loaded.
export function SizingPage({ model: given = "" }: { model?: string }) {
  const { models } = useModels();
  const [model, setModel] = useState(given);
  const [device, setDevice] = useState("");
  const [concurrency, setConcurrency] = useState("");
  const [draft, setDraft] = useState(NO_OPTIONS);
  const [busy, setBusy] = useState(false);
  const [answer, setAnswer] = useState(NOTHING);

  // Both questions at once, each shown when it is answered: what one of them refuses, the other may not, and a
  // check has vLLM imported.
  const look = async (from: Draft) => {
    const refuse = (error: unknown) => setAnswer((last) => ({ ...last, refused: [...new Set([...last.refused, message(error)])] }));
    const tell = (part: Partial<Answer>) => setAnswer((last) => ({ ...last, ...part }));
    setAnswer(NOTHING);
    setBusy(true);
    try {
      const given = device.trim() ? { ...options(from), device: device.trim() } : options(from);
      const wished = concurrency.trim() ? { ...given, concurrency: Number(concurrency) } : given;
      await Promise.all([
        post<Estimate>("api/v1/models/estimate", { model: model.trim(), options: wished }).then((estimate) => tell({ estimate }), refuse),
        post<Check>("api/v1/models/check", { model: model.trim(), options: given }).then((check) => tell({ check }), refuse),
      ]);
    } catch (error) {
      refuse(error);
    }
    setBusy(false);
  };

  const submit = (event: Event) => {
    event.preventDefault();
    void look(draft);
  };

  // Takes a proposal over, and asks again.
  const take = (proposed: Record<string, string>) => {
    const changed = { ...draft, fields: { ...draft.fields, ...proposed } };
    setDraft(changed);
    void look(changed);
  };

  return (
    <>
      <h1 tabIndex={-1}>Sizing</h1>
      <form class="card fields" onSubmit={submit}>
        <div class="columns">
          <TextField
            label="Model"
            required
            hint="A folder, a file, or a name. Of a model of the hub only the headers are read."
            list={models?.map((one) => one.name)}
            value={model}
            onChange={setModel}
          />
          <TextField label="Device" placeholder="this machine's" hint="Another one, such as H100, 2x A10G or 24GiB." value={device} onChange={setDevice} />
          <TextField label="Requests at a time" type="number" min={1} placeholder="1" value={concurrency} onChange={setConcurrency} />
        </div>
        <details>
          <summary>Options of the engine</summary>
          <div class="fields">
            <OptionFields draft={draft} onChange={setDraft} without={["replicas"]} />
          </div>
        </details>
        <div class="actions">
          <button type="submit" class="primary" disabled={busy}>
            {busy ? "Looking…" : "Look"}
          </button>
        </div>
      </form>
      <div aria-live="polite" aria-busy={busy}>
        {answer.refused.map((text) => (
          <p class="note bad" key={text}>
            {text}
          </p>
        ))}
        {answer.estimate && <EstimateView estimate={answer.estimate} onTake={take} />}
        {answer.check && <CheckView check={answer.check} />}
      </div>
    </>
  );
}

function EstimateView({ estimate, onTake }: { estimate: Estimate; onTake: (options: Record<string, string>) => void }) {
  const fits = estimate["fits?"];
  return (
    <section class="card">
      <h2>
        Memory <span class={`state ${fits ? "good" : "bad"}`}>{fits ? "it fits" : "it does not fit"}</span>
      </h2>
      {estimate.devices.map((device, n) => (
        <DeviceBar key={n} device={device} />
      ))}
      <dl class="figures">
        <Figure name="context" value={`${number(estimate.max_model_len)} tokens`} />
        <Figure name="requests at a time" value={number(estimate.concurrency)} />
        <Figure name="longest context that fits" value={`${number(estimate.longest_context)} tokens`} />
        <Figure name="most requests that fit" value={number(estimate.max_concurrency)} />
        <Figure name="tokens/s at most" value={number(estimate.tokens_per_second)} />
      </dl>
      {estimate.remedies.length > 0 && <h3>What would make it fit</h3>}
      <ul class="plain-list">
        {estimate.remedies.map(({ text, options: proposed }) => (
          <li key={text} class="remedy">
            {text}
            {proposed && Object.keys(proposed).length > 0 && (
              <button type="button" onClick={() => onTake(proposed)}>
                Use it
              </button>
            )}
          </li>
        ))}
      </ul>
      {estimate.formats.length > 0 && <Formats estimate={estimate} />}
    </section>
  );
}

const PARTS: [keyof DeviceEstimate, string][] = [
  ["weights", "weights"],
  ["kv_cache", "KV cache"],
  ["activations", "activations"],
  ["framework", "framework"],
  ["adapters", "adapters"],
  ["draft", "draft model"],
];

function DeviceBar({ device }: { device: DeviceEstimate }) {
  const parts = PARTS.map(([name, shown], n) => ({ name: shown, amount: device[name] as number, tone: n + 1 }));
  return (
    <div class="device">
      <p>
        <b>{device.name}</b>{" "}
        <span class="muted">
          {memory(device.memory)}, of which the engine takes {memory(device.budget)}
        </span>
      </p>
      <Stack label={`Memory of ${device.name}`} parts={parts} total={device.budget} show={memory} />
    </div>
  );
}

function Formats({ estimate }: { estimate: Estimate }) {
  return (
    <details>
      <summary>In other formats</summary>
      <Table label="Formats" columns={["Format", ">Files", ">In memory", "Here"]}>
        <tbody>
          {estimate.formats.map((format) => (
            <tr key={format.name}>
              <th scope="row">{format.name}</th>
              <td class="right">{file(format.disk)}</td>
              <td class="right">{memory(format.memory)}</td>
              <td>{format["fits?"] ? "fits" : "too large"}</td>
            </tr>
          ))}
        </tbody>
      </Table>
    </details>
  );
}

function CheckView({ check }: { check: Check }) {
  const ok = check["ok?"];
  return (
    <section class="card">
      <h2>
        Start <span class={`state ${ok ? "good" : "bad"}`}>{ok ? "it would run" : "it would not run"}</span>
      </h2>
      <dl class="figures">
        <Figure name="architecture" value={check.architecture ?? UNKNOWN} />
        <Figure name="quantization" value={check.method ?? "plain"} />
        <Figure name="kernel" value={check.kernel ?? UNKNOWN} />
        <Figure name="computes in" value={check.dtype ?? UNKNOWN} />
        <Figure name="context" value={number(check.max_model_len)} />
        <Figure name="can" value={check.capabilities?.join(", ") || UNKNOWN} />
      </dl>
      <ul class="plain-list">
        {check.findings.map((finding) => (
          <FindingItem key={finding.message} finding={finding} />
        ))}
      </ul>
    </section>
  );
}

const TONE = { error: "bad", warning: "warn", info: "quiet" };

function FindingItem({ finding }: { finding: Finding }) {
  return (
    <li>
      <span class={`state ${TONE[finding.severity]}`}>{finding.severity}</span> {finding.message} {finding.remedy && <b>{finding.remedy}</b>}
    </li>
  );
}
