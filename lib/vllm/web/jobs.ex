defmodule VLLM.Web.Jobs do
  @moduledoc false
  # Jobs over HTTP.

  alias VLLM.Job
  alias VLLM.Job.Progress
  alias VLLM.Web.{Answer, Given, Heavy}

  @doc "All jobs."
  def list(_asked), do: {:ok, %{jobs: Enum.map(Job.list(), &view/1)}}

  @doc "A job."
  def get(asked), do: answer(Job.get(id(asked)))

  @doc "Starts one."
  def start(asked) do
    with {:ok, options} <- options(asked.body),
         do: answer(Job.quantize(asked.body["model"], options))
  end

  @doc "Ends one."
  def cancel(asked) do
    with :ok <- Job.cancel(id(asked)), do: answer(Job.get(id(asked)))
  end

  @doc "Goes on with one."
  def retry(asked), do: answer(Job.retry(id(asked)))

  @doc "Deletes one."
  def delete(asked), do: Job.delete(id(asked), outputs: asked.query["outputs"])

  @doc "What its processes have printed."
  def log(asked), do: with({:ok, lines} <- Job.logs(id(asked)), do: {:ok, %{lines: lines}})

  @doc "What there is to choose from."
  def formats(asked) do
    Heavy.run(asked, fn ->
      with {:ok, formats} <- Job.formats(), do: {:ok, %{formats: formats}}
    end)
  end

  @doc "What one would take."
  def estimate(asked) do
    Heavy.run(asked, fn ->
      with {:ok, options} <- options(asked.body),
           {:ok, estimate} <- Job.estimate(asked.body["model"], options) do
        together = %{
          disk_bytes: estimate.disk,
          memory_bytes: estimate.memory,
          minutes: estimate.minutes,
          bytes: estimate.bytes
        }

        {:ok, %{estimates: Enum.map(estimate.outputs, &estimated/1), together: together}}
      end
    end)
  end

  defp estimated(output) do
    %{
      format: output.format,
      type: output.label,
      bytes: output.bytes,
      disk_bytes: output.disk,
      memory_bytes: output.memory,
      minutes: output.minutes,
      quality: output.usual_kl
    }
  end

  defp id(asked), do: asked.params["id"]

  defp answer({:ok, job}), do: {:ok, %{job: view(job)}}
  defp answer({:error, error}), do: {:error, error}

  # As `VLLM.Job.quantize/2` takes them.
  defp options(body) do
    with {:ok, options} <- Given.options(body) do
      given = Map.take(body, ["name"])
      {:ok, options |> Map.merge(given) |> Map.put("to", Enum.map(body["to"], &asked/1))}
    end
  end

  defp asked(%{"format" => format} = output) do
    case {output["type"], output["options"] || %{}} do
      {nil, options} -> {format, options}
      {type, options} when options == %{} -> {format, [type]}
      {type, options} -> {format, Map.put(options, "preset", type)}
    end
  end

  @doc "A job as the admin API tells of it."
  @spec view(Job.t()) :: map()
  def view(job) do
    progress = job.progress || %Progress{job: job.id, state: job.state}

    %{
      id: job.id,
      name: job.name,
      kind: job.kind,
      model: job.source,
      state: job.state,
      phase: progress.phase,
      percent: Progress.percent(progress),
      seconds_left: progress.seconds_left,
      waiting_for: job.waiting_for,
      outputs: Enum.map(job.outputs, &output(&1, job)),
      error: Answer.about(job.error),
      created_at: job.made_at,
      updated_at: job.ended_at || job.started_at || job.made_at
    }
  end

  defp output(output, job) do
    %{
      name: output.name || "#{job.name}:#{output.label}",
      format: output.format,
      type: output.label,
      state: output.state,
      bytes: output.bytes,
      quality: output.quality,
      error: Answer.about(output.error)
    }
  end
end
