# How much vLLM gains from computing requests together: 64 processes that each
# make one call, against the same 64 calls one after another.
#
#     mix run bench/batching.exs

Logger.configure(level: :warning)

path = fn name -> Application.app_dir(:ex_vllm, "priv/models/#{name}") end

prompts =
  path.("facts.tsv")
  |> File.stream!()
  |> Stream.map(&hd(String.split(&1, "\t")))
  |> Stream.cycle()
  |> Enum.take(64)

llm =
  VLLM.llm!(path.("demo"),
    max_model_len: 1024,
    enforce_eager: true,
    kv_cache_memory_bytes: 67_108_864
  )

# Equal work for each request, and long enough for it to overlap.
generate = fn prompt ->
  VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64, ignore_eos: true)
end

one_by_one = fn -> Enum.each(prompts, generate) end

at_once = fn ->
  prompts
  |> Task.async_stream(generate, max_concurrency: 64, timeout: :infinity)
  |> Stream.run()
end

as_a_list = fn ->
  VLLM.generate!(llm, prompts, temperature: 0.0, max_tokens: 64, ignore_eos: true)
end

generate.(hd(prompts))

# Interleaved, so that a busy machine is unfair to all of them alike; the best of three counts.
rounds =
  for _ <- 1..3 do
    for run <- [one_by_one, at_once, as_a_list], do: elem(:timer.tc(run), 0) / 1_000_000
  end

[alone, together, list] = rounds |> Enum.zip_with(& &1) |> Enum.map(&Enum.min/1)
tokens = 64 * 64

for {what, seconds} <- [
      {"64 calls, one after another", alone},
      {"64 processes at once", together},
      {"one call with 64 prompts", list}
    ] do
  IO.puts(
    "#{String.pad_trailing(what, 30)} #{Float.round(seconds, 2)} s  #{round(tokens / seconds)} tokens/s"
  )
end

IO.puts("together they take #{round(100 * together / alone)} % of the time one by one")
VLLM.stop(llm)
