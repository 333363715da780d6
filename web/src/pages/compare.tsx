import { useEffect, useState } from "preact/hooks";
import { compare, comparison, stopComparing } from "../comparison";
import { duration, file, number, percent, small } from "../format";
import { Gauge } from "../parts/bars";
import { Scatter } from "../parts/charts";
import { Check, SelectField, TextField } from "../parts/fields";
import { Table } from "../parts/table";
import { useStore } from "../store";
import type { ComparisonRow } from "../types";
import { useModels } from "../use-models";

// What models have lost to the one that they were made of.
export function ComparePage() {
  const { models } = useModels();
  const { started, rows, refused } = useStore(comparison);
  const [chosen, setChosen] = useState<string[]>(comparison.get().models);
  const [other, setOther] = useState("");
  const [reference, setReference] = useState("");

  const names = [...new Set([...(models ?? []).filter((model) => model.kind === "model").map((model) => model.name), ...chosen])];
  const choose = (name: string, on: boolean) => setChosen(on ? [...chosen, name] : chosen.filter((one) => one !== name));
  const first = chosen.includes(reference) ? reference : chosen[0];

  const submit = (event: Event) => {
    event.preventDefault();
    void compare([first!, ...chosen.filter((name) => name !== first)]);
  };

  const add = () => {
    if (other.trim() && !chosen.includes(other.trim())) setChosen([...chosen, other.trim()]);
    setOther("");
  };

  return (
    <>
      <h1 tabIndex={-1}>Compare</h1>
      <form class="card fields" onSubmit={submit}>
        <fieldset>
          <legend>Models</legend>
          <div class="chips">
            {names.map((name) => (
              <Check key={name} class="chip" label={name} checked={chosen.includes(name)} onChange={(on) => choose(name, on)} />
            ))}
            {names.length === 0 && <span class="muted">None has a name on this machine yet.</span>}
          </div>
        </fieldset>
        <div class="columns">
          <div class="beside">
            <TextField label="Another one" placeholder="a folder, a file, or a name of the hub" value={other} onChange={setOther} />
            <button type="button" disabled={!other.trim()} onClick={add}>
              Add
            </button>
          </div>
          {chosen.length > 0 && (
            <SelectField
              label="Reference"
              hint="The one that the others were made of."
              value={first!}
              onChange={setReference}
              options={chosen.map((name) => [name, name])}
            />
          )}
        </div>
        <div class="actions">
          <button type="submit" class="primary" disabled={chosen.length < 2 || started !== null}>
            Compare
          </button>
          {started !== null && (
            <button type="button" onClick={stopComparing}>
              Stop
            </button>
          )}
          <span class="hint">Each model is loaded and read 2,048 tokens: a minute each for small ones.</span>
        </div>
      </form>
      {started !== null && <Waiting since={started} />}
      {refused && (
        <p class="note bad" role="alert">
          {refused}
        </p>
      )}
      {rows && <Result rows={rows} />}
    </>
  );
}

function Waiting({ since }: { since: number }) {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, []);
  return (
    <div class="card loading">
      <Gauge role="progressbar" label="Comparing" share={null} text="comparing" />
      <p class="muted">Comparing, for {duration(Math.max((now - since) / 1000, 1))}. You may look at other pages.</p>
    </div>
  );
}

const known = (value: number | null): value is number => value !== null && value > 0;
const VERDICTS: Record<string, [string, string]> = {
  ok: ["good", "ok"],
  worse_than_usual: ["warn", "worse than usual"],
  broken: ["bad", "broken"],
};

function Result({ rows }: { rows: ComparisonRow[] }) {
  const lost = rows.filter((row) => known(row.kl_mean));
  const loss = { label: "mean KL divergence, less is better", show: small };
  const bySize = lost.filter((row) => known(row.bytes)).map((row) => ({ name: row.model, x: row.bytes!, y: row.kl_mean! }));
  const bySpeed = lost.filter((row) => known(row.tokens_per_second)).map((row) => ({ name: row.model, x: row.tokens_per_second!, y: row.kl_mean! }));

  return (
    <section aria-label="Result">
      <div class="charts two">
        {bySize.length > 0 && <Scatter title="What is lost, by size" x={{ label: "size of the weights in files", show: file }} y={loss} points={bySize} />}
        {bySpeed.length > 0 && <Scatter title="What is lost, by speed" x={{ label: "tokens a second, one request", show: number }} y={loss} points={bySpeed} />}
      </div>
      <Table label="Figures" columns={["Model", "Format", ">Size", ">KL", ">KL 99 %", ">Perplexity", ">Same top", ">Tokens/s", "Verdict"]}>
        <tbody>
          {rows.map((row, n) => (
            <Row key={row.model} row={row} reference={n === 0} />
          ))}
        </tbody>
      </Table>
      <ul class="plain-list">
        {rows.flatMap((row) =>
          (row.says ?? []).map((text) => (
            <li key={row.model + text}>
              <b>{row.model}</b>: {text}
            </li>
          )),
        )}
      </ul>
    </section>
  );
}

function Row({ row, reference }: { row: ComparisonRow; reference: boolean }) {
  const [tone, text] = row.error ? ["bad", "not measured"] : row.verdict ? (VERDICTS[row.verdict] ?? ["quiet", row.verdict]) : ["quiet", reference ? "reference" : ""];
  return (
    <tr>
      <th scope="row">{row.model}</th>
      <td>{row.format ?? "plain"}</td>
      <td class="right">{file(row.bytes)}</td>
      <td class="right">{small(row.kl_mean)}</td>
      <td class="right">{small(row.kl_p99)}</td>
      <td class="right">{number(row.perplexity)}</td>
      <td class="right">{percent(row.same_top)}</td>
      <td class="right">{number(row.tokens_per_second)}</td>
      <td>{text && <span class={`state ${tone}`}>{text}</span>}</td>
    </tr>
  );
}
