# Encoding and decoding of three realistic messages. Run with: mix run --no-start bench/message_pack.exs

alias VLLM.Bridge.MessagePack

defmodule Bench do
  @rounds 7
  @round_us 200_000

  # The fastest of several rounds is the one least disturbed by the rest of the machine.
  def ops_per_second(fun) do
    count = calibrate(fun, 1)
    fastest = Enum.min(for _ <- 1..@rounds, do: time(fun, count))
    count * 1_000_000 / fastest
  end

  defp calibrate(fun, count) do
    if time(fun, count) < @round_us, do: calibrate(fun, 2 * count), else: count
  end

  # Each round has a process of its own, and so a heap without garbage of the last one.
  defp time(fun, count) do
    Task.await(Task.async(fn -> elem(:timer.tc(fn -> repeat(fun, count) end), 0) end), :infinity)
  end

  defp repeat(_fun, 0), do: :ok

  defp repeat(fun, count) do
    fun.()
    repeat(fun, count - 1)
  end
end

prompt =
  "You are a careful assistant. Answer in two sentences: why does the tide come twice a day? " <>
    String.duplicate("The moon pulls at the water — and so does the sun. ", 8)

request = [
  0,
  4711,
  "generate",
  %{
    "request_id" => "req-00004711",
    "prompt" => prompt,
    "sampling_params" => %{
      "temperature" => 0.7,
      "top_p" => 0.95,
      "max_tokens" => 256,
      "seed" => 42,
      "stop" => ["\n\n", "</s>"],
      "logprobs" => nil,
      "skip_special_tokens" => true
    },
    "stream" => false,
    "priority" => 0
  }
]

response = [
  1,
  4711,
  nil,
  %{
    "request_id" => "req-00004711",
    "prompt_token_ids" => Enum.map(1..96, &rem(&1 * 7919, 151_936)),
    "outputs" => [
      %{
        "index" => 0,
        "text" => String.duplicate("Twice a day the tide comes in. ", 9),
        "token_ids" => Enum.map(1..64, &rem(&1 * 104_729, 151_936)),
        "cumulative_logprob" => -38.2716,
        "finish_reason" => "stop",
        "stop_reason" => nil
      }
    ],
    "metrics" => %{"arrival_time" => 1_762_000_000.25, "first_token_time" => 1_762_000_000.375}
  }
]

entries =
  for n <- 1..1000 do
    %{"id" => n, "logprob" => -n / 7, "rank" => rem(n, 50), "decoded_token" => " token#{n}"}
  end

IO.puts("payload              bytes        encode             decode")

for {name, term} <- [
      {"generate request", request},
      {"response, 64 tokens", response},
      {"1,000 small maps", entries}
    ] do
  binary = IO.iodata_to_binary(MessagePack.encode!(term))
  size = byte_size(binary)

  columns =
    for fun <- [fn -> MessagePack.encode(term) end, fn -> MessagePack.decode(binary) end] do
      ops = Bench.ops_per_second(fun)
      :io_lib.format("~9b/s ~6.1f MB/s", [round(ops), ops * size / 1_000_000])
    end

  IO.puts(:io_lib.format("~-19s ~6b ~s ~s", [name, size | columns]))
end
