# The codec, over what this protocol sends (guides/protocol.md): MB/s of encoding and decoding, and beside
# Msgpax where its source is at hand.
#
#     mix run --no-start bench/message_pack.exs [FOLDER]
#
# FOLDER is that of Msgpax (`git clone https://github.com/lexmag/msgpax`), which is compiled into a temporary
# folder, its protocol consolidated as Mix does it. Both encode to one binary, what a port makes of iodata anyway.
# Each figure is the median of the rounds (`ROUNDS=15`), in which both have their turns; the ratio, ours
# to Msgpax, is that of a round, with its 95 % interval by bootstrap.

alias VLLM.Bridge.MessagePack

defmodule Bench.Peer do
  @moduledoc false

  # Without what needs Plug.
  def load(folder) do
    out = Path.join(System.tmp_dir!(), "ex_vllm-bench-msgpax-#{System.pid()}")
    File.mkdir_p!(out)
    sources = Path.wildcard(Path.join(folder, "lib/**/*.ex"))
    sources = Enum.reject(sources, &String.ends_with?(&1, "plug_parser.ex"))
    {:ok, _modules, _warnings} = Kernel.ParallelCompiler.compile_to_path(sources, out)
    # credo:disable-for-next-line
    packer = Module.concat(["Msgpax", "Packer"])
    kinds = Protocol.extract_impls(packer, [out])
    {:ok, binary} = Protocol.consolidate(packer, kinds)
    :code.purge(packer)
    {:module, ^packer} = :code.load_binary(packer, ~c"consolidated", binary)
    File.rm_rf!(out)
  end
end

defmodule Bench.Codec do
  @moduledoc false

  alias VLLM.Bench.Statistics

  @rounds String.to_integer(System.get_env("ROUNDS", "15"))
  @round_us 50_000

  # Each round has a process of its own, and so a heap without garbage of the last one.
  def microseconds(fun, count) do
    Task.await(Task.async(fn -> elem(:timer.tc(fn -> repeat(fun, count) end), 0) end), :infinity)
  end

  defp repeat(_fun, 0), do: :ok

  defp repeat(fun, count) do
    fun.()
    repeat(fun, count - 1)
  end

  def calibrate(fun, count \\ 1) do
    if microseconds(fun, count) < @round_us, do: calibrate(fun, 2 * count), else: count
  end

  def compare(ours, theirs, bytes) do
    count = calibrate(ours)

    rounds = for _ <- 0..@rounds, do: for(fun <- [ours | theirs], do: microseconds(fun, count))

    [mine | others] = rounds |> tl() |> Enum.zip_with(& &1)
    rate = fn times -> count * bytes / Statistics.median(times) end
    ratios = for other <- others, do: Enum.zip_with(other, mine, &(&1 / &2))
    {Enum.map([mine | others], rate), Enum.map(ratios, &Statistics.interval/1)}
  end
end

prompt =
  "You are a careful assistant. Answer in two sentences: why does the tide come twice a day? " <>
    String.duplicate("The moon pulls at the water — and so does the sun. ", 8)

u32 = fn numbers -> for n <- numbers, into: <<>>, do: <<n::32-little>> end

request = fn _bin ->
  sampling_params = %{
    "temperature" => 0.7,
    "top_p" => 0.95,
    "max_tokens" => 256,
    "seed" => 42,
    "stop" => ["\n\n", "</s>"]
  }

  params = %{
    "prompt" => prompt,
    "sampling_params" => sampling_params,
    "timeout" => 60.0,
    "credit" => 128
  }

  [0, 4711, "generate", params]
end

response = fn bin ->
  completion = %{
    "index" => 0,
    "text" => String.duplicate("Twice a day the tide comes in. ", 9),
    "token_ids" => bin.(u32.(1..64)),
    "cumulative_logprob" => nil,
    "logprobs" => nil,
    "finish_reason" => "stop",
    "stop_reason" => nil
  }

  output = %{
    "request_id" => "4711",
    "prompt" => prompt,
    "prompt_token_ids" => bin.(u32.(1..96)),
    "prompt_logprobs" => nil,
    "outputs" => [completion],
    "finished" => true,
    "num_cached_tokens" => 0,
    "metrics" => %{"arrival_time" => 1_762_000_000.25, "first_token_latency" => 0.125}
  }

  [1, 4711, nil, output]
end

deltas = fn count ->
  fn bin ->
    columns = %{
      "ids" => bin.(for n <- 1..count, into: <<>>, do: <<n::64-little>>),
      "counts" => bin.(u32.(List.duplicate(1, count))),
      "token_ids" => bin.(u32.(1..count)),
      "texts" => for(n <- 1..count, do: Enum.at([" the", " tide", ".", ""], rem(n, 4)))
    }

    [2, "packed_deltas", columns]
  end
end

logprobs = fn bin ->
  places = %{
    "counts" => bin.(u32.(List.duplicate(5, 64))),
    "token_ids" => bin.(u32.(1..320)),
    "logprobs" => bin.(for n <- 1..320, into: <<>>, do: <<-n / 7::float-32-little>>),
    "ranks" => bin.(u32.(1..320)),
    "tokens" => for(n <- 1..320, do: " token#{n}")
  }

  row = [7, 0, " the tide", bin.(u32.(1..64)), places, nil, nil]
  [2, "deltas", %{"deltas" => [row]}]
end

theirs =
  case System.argv() do
    [] ->
      nil

    [folder] ->
      Bench.Peer.load(folder)
      Module.concat(["Msgpax"])
  end

peer_bin = fn data -> apply(Module.concat(["Msgpax", "Bin"]), :new, [data]) end
names = if theirs, do: ["MessagePack", "Msgpax", "ratio"], else: ["MessagePack"]

IO.puts(
  "| payload | bytes | " <>
    Enum.map_join(["encode", "decode"], " | ", &"#{&1}: #{Enum.join(names, ", ")}") <> " |"
)

for {name, payload} <- [
      {"request", request},
      {"answer of 64 tokens", response},
      {"a step of 1 delta", deltas.(1)},
      {"a step of 256 deltas", deltas.(256)},
      {"64 tokens with 5 logprobs", logprobs}
    ] do
  own = payload.(&MessagePack.bin/1)
  binary = IO.iodata_to_binary(MessagePack.encode!(own))

  {packs, unpacks} =
    if theirs do
      other = payload.(peer_bin)
      # The same bytes, but for the order of keys.
      true = theirs.unpack!(binary) == theirs.unpack!(theirs.pack!(other, iodata: false))
      {[fn -> theirs.pack!(other, iodata: false) end], [fn -> theirs.unpack!(binary) end]}
    else
      {[], []}
    end

  encode = fn -> IO.iodata_to_binary(MessagePack.encode!(own)) end
  decode = fn -> {:ok, _} = MessagePack.decode(binary) end

  cells =
    for {fun, peers} <- [{encode, packs}, {decode, unpacks}] do
      {rates, ratios} = Bench.Codec.compare(fun, peers, byte_size(binary))
      rates = Enum.map(rates, &"#{round(&1)}")

      ratios =
        for {median, low, high} <- ratios,
            do: :io_lib.format("~.2f (~.2f to ~.2f)", [median, low, high])

      Enum.join(rates ++ ratios, ", ")
    end

  IO.puts("| #{name} | #{byte_size(binary)} | #{Enum.join(cells, " | ")} |")
end
