defmodule VLLM.Livebook do
  @moduledoc """
  Reads Livebook's notebooks, and runs their code cells as Livebook does.
  """

  import ExUnit.CaptureIO

  @root Path.expand("../..", __DIR__)

  # A fenced block, after the comment with what Livebook keeps of it.
  @block ~r/(?:^<!-- livebook:(\{.*?\}) -->\n\n)?^```(\w*)\n(.*?)\n```$/ms

  @type cell :: %{line: pos_integer(), code: String.t(), outputs: [String.t()]}

  @doc "The books of this repository by their names."
  @spec books() :: [String.t()]
  def books do
    for path <- Path.wildcard(Path.join(@root, "livebooks/*.livemd")),
        do: Path.basename(path, ".livemd")
  end

  @spec path(String.t()) :: Path.t()
  def path(book), do: Path.join([@root, "livebooks", book <> ".livemd"])

  @doc """
  A book's set-up cell, its other cells with the outputs that it shows of them, and the code that
  it shows and does not run.
  """
  @spec read(String.t()) :: %{setup: cell(), cells: [cell()], shown: [String.t()]}
  def read(book) do
    text = File.read!(path(book))

    {cells, shown} =
      @block
      |> Regex.scan(text, return: :index)
      |> Enum.map(fn [_all | parts] -> Enum.map(parts, &part(text, &1)) end)
      |> Enum.reduce({[], []}, &put/2)

    [setup | cells] = Enum.reverse(cells)
    %{setup: setup, cells: cells, shown: shown}
  end

  defp part(_text, {-1, 0}), do: {0, ""}

  defp part(text, {start, length}) do
    before = binary_part(text, 0, start)
    {length(String.split(before, "\n")), binary_part(text, start, length)}
  end

  defp put([{_, ~s({"output":true})}, _language, {_, output}], {[cell | cells], shown}),
    do: {[Map.update!(cell, :outputs, &(&1 ++ [output])) | cells], shown}

  defp put([{_, ~s({"force_markdown":true})}, {_, "elixir"}, {_, code}], {cells, shown}),
    do: {cells, [code | shown]}

  defp put([_meta, {_, "elixir"}, {line, code}], {cells, shown}),
    do: {[%{line: line, code: code, outputs: []} | cells], shown}

  defp put(_other, read), do: read

  @doc """
  Runs the cells in their order, and gives for each that shows outputs `{line, shown, given}`, and
  the bindings at the end.
  """
  @spec run(String.t()) :: {[{pos_integer(), [String.t()], [String.t()]}], keyword()}
  def run(book) do
    {outputs, bindings} =
      Enum.map_reduce(read(book).cells, [], fn cell, bindings ->
        {{result, bindings}, printed} =
          with_io(fn ->
            Code.eval_string(cell.code, bindings, file: path(book), line: cell.line)
          end)

        {{cell.line, cell.outputs, printed(printed) ++ result(result)}, bindings}
      end)

    {for({_, [_ | _], _} = output <- outputs, do: output), bindings}
  end

  defp printed(""), do: []
  defp printed(text), do: [String.trim_trailing(text, "\n")]

  # What Kino renders is no text.
  defp result(%module{} = result) do
    if match?(["Kino" | _], Module.split(module)), do: [], else: [text(result)]
  end

  defp result(result), do: [text(result)]

  defp text(result), do: inspect(result, pretty: true, width: 100)
end
