import { useState } from "preact/hooks";
import { ask } from "../api";
import { file, moment, UNKNOWN } from "../format";
import { Dialog } from "../parts/dialog";
import { notify } from "../parts/notices";
import { Table } from "../parts/table";
import { link } from "../route";
import type { Model } from "../types";
import { useModels } from "../use-models";
import { ShareDialog, Uploads } from "./share";
import { StartDialog } from "./start";

export function ModelsPage() {
  const { models, refused, again } = useModels();
  const [deploying, setDeploying] = useState<string | null>(null);
  const [sharing, setSharing] = useState<string | null>(null);
  const [deleting, setDeleting] = useState<Model | null>(null);
  const [filter, setFilter] = useState("");
  const shown = models?.filter((model) => [model.name, model.format, model.type].join(" ").toLowerCase().includes(filter.toLowerCase()));

  return (
    <>
      <div class="head">
        <h1 tabIndex={-1}>Models</h1>
        <input type="search" placeholder="Filter" aria-label="Filter the models" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
      </div>
      <Uploads />
      {refused && <p class="note bad">{refused}</p>}
      {!models && !refused && <p class="muted">Reading…</p>}
      {models?.length === 0 && <p class="card empty">This machine has no models with names: none was made by a job, registered, or downloaded.</p>}
      {!!shown?.length && (
        <Table label="Models of this machine" columns={["Name", "Format", ">Size", "Since", ""]}>
          <tbody>
            {shown.map((model) => (
              <tr key={model.name}>
                <th scope="row" title={model.path ?? undefined}>
                  {model.name}
                </th>
                <td>{formatOf(model)}</td>
                <td class="right">{file(model.bytes)}</td>
                <td>{model.created_at ? moment(model.created_at) : UNKNOWN}</td>
                <td>
                  <div class="actions end">
                    {model.kind === "model" && (
                      <>
                        <button type="button" aria-label={`Deploy ${model.name}`} onClick={() => setDeploying(model.name)}>
                          Deploy…
                        </button>
                        <a class="button" href={link("sizing", model.name)} aria-label={`Sizing of ${model.name}`}>
                          Sizing
                        </a>
                      </>
                    )}
                    <button type="button" aria-label={`Share ${model.name}`} onClick={() => setSharing(model.name)}>
                      Share…
                    </button>
                    <button type="button" class="danger" aria-label={`Delete ${model.name}`} onClick={() => setDeleting(model)}>
                      Delete…
                    </button>
                  </div>
                </td>
              </tr>
            ))}
          </tbody>
        </Table>
      )}
      {deploying && <StartDialog model={deploying} onClose={() => setDeploying(null)} />}
      {sharing && <ShareDialog model={sharing} onClose={() => setSharing(null)} />}
      {deleting && <DeleteDialog model={deleting} onClose={() => setDeleting(null)} onDeleted={again} />}
    </>
  );
}

const formatOf = ({ kind, format, type }: Model): string => (kind === "adapter" ? "adapter" : [format, type].filter(Boolean).join(" ") || "plain");

function DeleteDialog({ model, onClose, onDeleted }: { model: Model; onClose: () => void; onDeleted: () => void }) {
  const remove = async () => {
    await ask(`api/v1/models/${encodeURIComponent(model.name)}`, { method: "DELETE" });
    notify(`${model.name} is deleted.`);
    onDeleted();
  };

  return (
    <Dialog title={`Delete ${model.name}?`} action="Delete" danger onClose={onClose} onAction={remove}>
      <p>What was made or downloaded here goes with its files, {file(model.bytes)}. A folder that was only given a name stays.</p>
    </Dialog>
  );
}
