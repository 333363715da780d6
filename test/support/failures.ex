defmodule VLLM.Failures do
  @moduledoc """
  An ExUnit formatter that says at the very end which tests failed, and how, in a few lines each.
  Before it stand the logs of engines, in which a failure is hard to find.
  """

  use GenServer

  @lines 12

  @impl true
  def init(_config), do: {:ok, []}

  @impl true
  def handle_cast({:test_finished, %{state: {:failed, reasons}} = test}, texts) do
    number = length(texts) + 1
    text = ExUnit.Formatter.format_test_failure(test, reasons, number, 120, &plain/2)
    {:noreply, [text | texts]}
  end

  def handle_cast({:module_finished, %{state: {:failed, reasons}} = module}, texts) do
    number = length(texts) + 1
    text = ExUnit.Formatter.format_test_all_failure(module, reasons, number, 120, &plain/2)
    {:noreply, [text | texts]}
  end

  def handle_cast(_event, texts), do: {:noreply, texts}

  # Formatters are stopped in the order of their start, when all is reported.
  @impl true
  def terminate(_reason, []), do: :ok

  def terminate(_reason, texts) do
    IO.puts("\nFailed, with the first lines of each:\n")

    for text <- Enum.reverse(texts) do
      text |> String.split("\n") |> Enum.take(@lines) |> Enum.join("\n") |> IO.puts()
    end
  end

  defp plain(:diff_enabled?, _), do: false
  defp plain(_key, text), do: text
end
