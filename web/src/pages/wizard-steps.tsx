import { file, memory, minutes, small } from "../format";
import { Check, SelectField, TextField } from "../parts/fields";
import { Figure } from "../parts/figure";
import { Table } from "../parts/table";
import type { Format, FormatOption, OutputEstimate } from "../types";
import { useModels } from "../use-models";
import type { Estimates, Plan } from "./wizard";
import { suggestion } from "./wizard";

interface StepProps {
  plan: Plan;
  onChange: (by: Partial<Plan>) => void;
}

export function SourceStep({ plan, onChange }: StepProps) {
  const { models } = useModels();
  return (
    <>
      <TextField
        label="Model"
        required
        hint="A plain model in safetensors: a folder, a name of the Hugging Face hub, or one of this machine."
        list={models?.filter((model) => model.kind === "model" && (!model.format || model.format === "plain")).map((model) => model.name)}
        value={plan.model}
        onChange={(model) => onChange({ model })}
      />
      <TextField
        label="Name of what comes of it"
        placeholder={suggestion(plan.model)}
        hint="Each output is called by this name, a colon and its type."
        value={plan.name}
        onChange={(name) => onChange({ name })}
      />
    </>
  );
}

export function FormatsStep({ plan, formats, onChange }: StepProps & { formats: Format[] | null }) {
  if (!formats) return <p class="muted">Reading…</p>;
  const choose = ({ format, types }: Format, on: boolean) => {
    const { [format]: _gone, ...others } = plan.chosen;
    onChange({ chosen: on ? { ...others, [format]: { types: types.length === 1 ? types : [], options: {} } } : others });
  };

  return (
    <fieldset>
      <legend>What to make of it</legend>
      <div class="choices">
        {formats.map((format) => (
          <Check
            key={format.format}
            class="choice"
            disabled={format.refused !== null}
            checked={format.format in plan.chosen}
            onChange={(on) => choose(format, on)}
            label={
              <>
                <b>{format.format}</b>
                <small>{format.refused ?? sample(format.types)}</small>
              </>
            }
          />
        ))}
      </div>
    </fieldset>
  );
}

const SHOWN = 6;
const sample = (types: string[]): string => (types.length > SHOWN ? `${types.slice(0, SHOWN).join(", ")} and ${types.length - SHOWN} more` : types.join(", "));

export function TypesStep({ plan, formats, estimates, onChange }: StepProps & { formats: Format[]; estimates: Estimates }) {
  return (
    <>
      {formats
        .filter(({ format }) => format in plan.chosen)
        .map((format) => (
          <FormatFields key={format.format} format={format} plan={plan} onChange={onChange} />
        ))}
      <EstimateTable estimates={estimates} />
    </>
  );
}

function FormatFields({ format: { format, types, options }, plan, onChange }: StepProps & { format: Format }) {
  const chosen = plan.chosen[format]!;
  const set = (by: Partial<typeof chosen>) => onChange({ chosen: { ...plan.chosen, [format]: { ...chosen, ...by } } });

  return (
    <fieldset>
      <legend>{format}</legend>
      <div class="chips">
        {types.map((type) => (
          <Check
            key={type}
            class="chip"
            label={type}
            checked={chosen.types.includes(type)}
            onChange={(on) => set({ types: on ? [...chosen.types, type] : chosen.types.filter((one) => one !== type) })}
          />
        ))}
      </div>
      {options.length > 0 && (
        <details>
          <summary>Options of {format}</summary>
          <div class="columns">
            {options.map((option) => (
              <OptionField
                key={option.name}
                option={option}
                value={chosen.options[option.name] ?? ""}
                onChange={(text) => set({ options: { ...chosen.options, [option.name]: text } })}
              />
            ))}
          </div>
        </details>
      )}
    </fieldset>
  );
}

function OptionField({ option, value, onChange }: { option: FormatOption; value: string; onChange: (text: string) => void }) {
  const usual = option.default === null ? "none" : typeof option.default === "string" ? option.default : JSON.stringify(option.default);
  const shared = { label: option.name, hint: option.doc ?? undefined, value, onChange };
  if (typeof option.default !== "boolean") return <TextField {...shared} placeholder={usual} />;
  return (
    <SelectField
      {...shared}
      options={[
        ["", `default (${usual})`],
        ["true", "true"],
        ["false", "false"],
      ]}
    />
  );
}

export function ReviewStep({ plan, estimates, onChange }: StepProps & { estimates: Estimates }) {
  return (
    <>
      <dl class="figures">
        <Figure name="source" value={plan.model} />
        <Figure name="name" value={plan.name.trim() || suggestion(plan.model)} />
      </dl>
      <EstimateTable estimates={estimates} />
      <Check
        label="Load each output and compare it with the source before it gets its name"
        checked={plan.verify}
        onChange={(verify) => onChange({ verify })}
      />
      <TextField
        label="Texts to calibrate with"
        placeholder="those that come with the library"
        hint="A text or JSONL file, or a folder of such, on the server's machine; for formats that are calibrated."
        value={plan.calibration}
        onChange={(calibration) => onChange({ calibration })}
      />
    </>
  );
}

function EstimateTable({ estimates: { each, together, refused, busy } }: { estimates: Estimates }) {
  if (refused)
    return (
      <p class="note bad" role="alert">
        {refused}
      </p>
    );
  if (each.length === 0) return <p class="muted">{busy ? "Estimating…" : "Choose a type to see what it takes."}</p>;
  const most = Math.max(...each.map((one) => one.bytes ?? 0), 1);
  const isKnown = each.some((one) => one.quality !== null);

  return (
    <Table label="Estimates" columns={["Output", "Size", ...(isKnown ? [">Usual loss (KL)"] : []), ">Disk to make it", ">Memory to make it", ">Time"]} class={busy ? "stale" : ""}>
      <tbody>
        {each.map((one, n) => (
          <EstimateRow key={n} estimate={one} most={most} isKnown={isKnown} />
        ))}
      </tbody>
      {together && (
        <tfoot>
          <tr>
            <th scope="row">Together</th>
            <td>{file(together.bytes)}</td>
            {isKnown && <td />}
            <td class="right">{file(together.disk_bytes)}</td>
            <td class="right">{memory(together.memory_bytes)}</td>
            <td class="right">{minutes(together.minutes)}</td>
          </tr>
        </tfoot>
      )}
    </Table>
  );
}

function EstimateRow({ estimate, most, isKnown }: { estimate: OutputEstimate; most: number; isKnown: boolean }) {
  return (
    <tr>
      <th scope="row">
        {estimate.type ?? estimate.format} <span class="muted">{estimate.type && estimate.format}</span>
      </th>
      <td>
        <span class="sized">
          {file(estimate.bytes)}
          <svg class="bar thin" aria-hidden="true">
            <rect class="tone-1" width={`${((estimate.bytes ?? 0) / most) * 100}%`} height="100%" />
          </svg>
        </span>
      </td>
      {isKnown && <td class="right">{small(estimate.quality)}</td>}
      <td class="right">{file(estimate.disk_bytes)}</td>
      <td class="right">{memory(estimate.memory_bytes)}</td>
      <td class="right">{minutes(estimate.minutes)}</td>
    </tr>
  );
}
