defmodule Mix.Vllm.Outputs do
  @moduledoc false
  # What tasks print of jobs: what one would take, how far it is, and what came of it.

  alias Mix.Vllm.{Answer, Table}
  alias VLLM.{Bytes, Job, Terminal}

  @doc "Prints what a job would take."
  @spec print_estimate(Job.Estimate.t()) :: :ok
  def print_estimate(estimate) do
    columns = ["output" | Enum.map(["size", "disk", "memory", "minutes"], &{:right, &1})]
    rows = for one <- estimate.outputs, do: [one.label | sizes(one)]
    Table.print(columns, rows ++ [["together" | sizes(estimate)]])
  end

  defp sizes(%{bytes: bytes, disk: disk, memory: memory, minutes: {least, most}}),
    do:
      Enum.map([bytes, disk, memory], &Bytes.file/1) ++ ["#{minutes(least)} to #{minutes(most)}"]

  defp minutes(minutes) when minutes < 1, do: Table.decimal(minutes, 1)
  defp minutes(minutes), do: Integer.to_string(ceil(minutes))

  @doc "Waits for a job and prints its outputs."
  @spec await(Job.t(), [String.t()]) :: :ok
  def await(job, flags) do
    shown = if "json" in flags, do: [progress: false], else: []
    unless "json" in flags, do: Mix.shell().info("Job #{job.id}")
    job |> Job.await(shown) |> Answer.ok!() |> Answer.print(flags, &print/1)
  end

  @doc "Prints outputs as a table, and then what else is to be known of them."
  @spec print([Job.Output.t()]) :: :ok
  def print(outputs) do
    columns = ["output", "state", {:right, "size"}, {:right, "made in"}, "against its source"]
    Table.print(columns, Enum.map(outputs, &row/1))

    for output <- outputs, note <- output.notes do
      [first | more] = Table.wrap("#{name(output)}: #{note}")
      Enum.each([first | Enum.map(more, &("  " <> &1))], &Mix.shell().info/1)
    end

    :ok
  end

  defp name(output), do: output.name || output.label

  defp row(output) do
    [
      name(output),
      Atom.to_string(output.state),
      Bytes.file(output.bytes),
      if(output.seconds, do: Terminal.time(output.seconds), else: "-"),
      quality(output)
    ]
  end

  defp quality(%{error: error}) when error != nil, do: error.message
  # Of an adapter.
  defp quality(%{figures: %{"kept" => kept} = figures}) do
    loss =
      with %{"before" => before, "after" => now} <- figures["held_out_loss"],
           do: "held-out loss #{Table.decimal(now, 3)} (before #{Table.decimal(before, 3)})"

    answers = "#{kept["same"]} of #{kept["prompts"]} other answers the same"
    Enum.join(List.wrap(loss) ++ [answers], ", ")
  end

  defp quality(%{quality: nil}), do: "not compared"

  defp quality(%{quality: quality}) do
    figures =
      for {name, word, factor, unit} <- [
            {"kl_mean", "KL divergence", 1, ""},
            {"same_top", "same top token", 100, " %"},
            {"perplexity", "perplexity", 1, ""}
          ],
          is_number(quality[name]),
          do: "#{word} #{Table.decimal(quality[name] * factor, 3)}#{unit}"

    verdict = if quality["verdict"] == "worse_than_usual", do: ["worse than usual"], else: []
    # Its source could not be measured, which its notes tell.
    compared = if quality["kl_mean"] == nil, do: ["not compared"], else: []
    Enum.join(compared ++ verdict ++ figures, ", ")
  end
end
