# What messages of others in the caller's mailbox cost a call. No model and no Python:
#
#     MIX_ENV=prod mix run bench/mailbox.exs
#
# Each figure is the median of seven, in microseconds a prompt or a delta.

defmodule Bench.Mailbox do
  @prompts 200
  @foreign [0, 1_000, 100_000]

  def run do
    Logger.configure(level: :error)
    deltas = for n <- 1..@prompts, do: "#{n} "
    llm = VLLM.Test.start!(script: %{"x" => "y", "stream" => {:deltas, deltas}})
    prompts = List.duplicate("x", @prompts)

    calls = [
      {"generate, one prompt", 1, fn -> VLLM.generate!(llm, "x") end},
      {"generate, #{@prompts} prompts", @prompts, fn -> VLLM.generate!(llm, prompts) end},
      {"generate_stream", @prompts, fn -> Stream.run(VLLM.generate_stream(llm, prompts)) end},
      {"stream, #{@prompts} deltas", @prompts, fn -> Stream.run(VLLM.stream!(llm, "stream")) end}
    ]

    columns = for n <- @foreign, do: String.pad_leading("#{n}", 10)
    IO.puts(String.pad_trailing("messages of others", 24) <> Enum.join(columns))

    for {name, count, call} <- calls do
      figures = for foreign <- @foreign, do: measure(foreign, count, call)
      IO.puts(String.pad_trailing(name, 24) <> Enum.join(figures))
    end
  end

  # In a process of its own, whose mailbox is its own.
  defp measure(foreign, count, call) do
    task =
      Task.async(fn ->
        for n <- 1..foreign//1, do: send(self(), {:foreign, n})
        call.()

        times = for _ <- 1..7, do: call |> :timer.tc() |> elem(0)
        Enum.at(Enum.sort(times), 3) / count
      end)

    task
    |> Task.await(:infinity)
    |> :erlang.float_to_binary(decimals: 1)
    |> String.pad_leading(10)
  end
end

Bench.Mailbox.run()
