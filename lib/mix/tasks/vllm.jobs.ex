defmodule Mix.Tasks.Vllm.Jobs do
  @shortdoc "Shows the jobs that make models, and ends or retries them"

  @moduledoc """
  Shows the jobs of this machine that make models, those first that were asked for last; also those
  that another application runs at the moment.

      mix vllm.jobs [--json]
      mix vllm.jobs ID [--json]
      mix vllm.jobs --logs ID
      mix vllm.jobs --cancel ID
      mix vllm.jobs --retry ID
      mix vllm.jobs --delete ID [--outputs]

  With the id of a job it shows its outputs, and why it failed. `--logs` prints what its processes have
  printed. `--cancel` ends it, whoever runs it. `--retry` goes on with one that has ended before all its
  outputs were there, in this task, with a bar. `--delete` removes one that has ended, and with
  `--outputs` the models that it has made.

  `--json` prints the same for programs (`VLLM.Job`). Ends with status 1 where there is no such job.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Outputs, Table}
  alias VLLM.Job

  @requirements ["app.start"]

  @switches [
    json: :boolean,
    logs: :string,
    cancel: :string,
    retry: :string,
    delete: :string,
    outputs: :boolean
  ]

  @impl Mix.Task
  def run(argv) do
    {options, words, unknown} = OptionParser.parse(argv, strict: @switches)
    flags = if options[:json], do: ["json"], else: []

    case {Keyword.drop(options, [:json]), words, unknown} do
      {[], [], []} ->
        Answer.print(Job.list(), flags, &print/1)

      {[], [id], []} ->
        id |> Job.get() |> Answer.ok!() |> Answer.print(flags, &show/1)

      {[logs: id], [], []} ->
        id |> Job.logs() |> Answer.ok!() |> Enum.each(&Mix.shell().info/1)

      {[cancel: id], [], []} ->
        done!(Job.cancel(id), "#{id} is cancelled.")

      {[retry: id], [], []} ->
        id |> Job.retry() |> Answer.ok!() |> Outputs.await(flags)

      {[{:delete, id} | outputs], [], []} ->
        done!(Job.delete(id, outputs), "#{id} is deleted.")

      _other ->
        Mix.raise("mix vllm.jobs does not take that: see mix help vllm.jobs")
    end
  end

  defp done!(result, text) do
    :done = Answer.ok!(with :ok <- result, do: {:ok, :done})
    Mix.shell().info(text)
  end

  @doc false
  @spec print([Job.t()]) :: :ok
  def print([]),
    do:
      Mix.shell().info("There are none; `mix vllm.quantize` and `mix vllm.finetune` start some.")

  def print(jobs) do
    columns = ["job", "kind", "name", "state", {:right, "outputs"}, "how far"]
    Table.print(columns, Enum.map(jobs, &row/1))
  end

  defp row(job) do
    done = Enum.count(job.outputs, &(&1.state == :done))

    [
      job.id,
      Atom.to_string(job.kind),
      job.name,
      Atom.to_string(job.state),
      "#{done} of #{length(job.outputs)}",
      how_far(job)
    ]
  end

  defp how_far(%{state: :done, ended_at: time}), do: Calendar.strftime(time, "%Y-%m-%d %H:%M")
  defp how_far(%{error: error}) when error != nil, do: error.message
  defp how_far(%{progress: progress}), do: Job.Progress.describe(progress)

  defp show(job) do
    Mix.shell().info("#{job.name}, made of #{job.source}: #{how_far(job)}")
    Outputs.print(job.outputs)
  end
end
