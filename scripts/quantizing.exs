# Makes the demo model in every format by jobs, and writes what was lost into guides/quantizing.md:
#
#     mix run scripts/quantizing.exs [FOLDER [FORMAT...]]
#
# It takes the quantizing environment (`mix vllm.setup --with quantize`), and a quarter of an hour on two
# cores, where it stands back behind nobody. The job and its outputs are in FOLDER, where a second run
# goes on at what the first one has left; without it they are thrown away. With FORMATs only these are
# made, in a FOLDER of their own, and rows of others stay as they are.

alias VLLM.{Data, Job}

guide = Path.expand("../guides/quantizing.md", __DIR__)
model = Path.expand("../priv/models/demo", __DIR__)
mark = "<!-- table of what was lost: written by scripts/quantizing.exs -->"
mark_end = "<!-- end of the table of what was lost -->"

outputs = [
  gptq: [
    [bits: 4],
    [bits: 4, group_size: 32],
    [bits: 4, desc_act: true],
    [bits: 8],
    [bits: 3],
    [bits: 2, group_size: 32]
  ],
  awq: [[], [group_size: 64]],
  "compressed-tensors": ~w(W4A16 W8A8 FP8_DYNAMIC FP8_BLOCK),
  bitsandbytes: ~w(nf4 nf4-double fp4 int8),
  hqq: ~w(8bit 4bit 3bit 2bit),
  torchao: ~w(int8),
  gguf: ~w(F16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 IQ4_XS Q3_K_M Q2_K)
]

formats = for {format, _} <- outputs, do: Atom.to_string(format)
{folder, asked} = System.argv() |> Enum.split(1)

folder =
  case folder do
    [folder] -> Path.expand(folder)
    [] -> Path.join(System.tmp_dir!(), "ex_vllm-quantizing-#{System.os_time()}")
  end

outputs = for {format, _} = one <- outputs, asked == [] or "#{format}" in asked, do: one

Application.put_env(:ex_vllm, :data_dir, folder)

job =
  case Job.list() do
    [job | _] -> Job.retry!(job)
    [] -> Job.quantize!(model, name: "demo", to: outputs, nice: 0)
  end

# What could not be made stands in the table, too; of a job that is cancelled what was made.
_ = Job.await(job, progress: true)
job = Job.get!(job)
ended = Enum.filter(job.outputs, &(&1.quality || &1.error))

decimal = fn
  nil, _digits -> "?"
  number, digits -> :erlang.float_to_binary(number / 1, decimals: digits)
end

row = fn output ->
  case output.quality do
    nil ->
      "| `#{output.label}` | #{output.format} ||||||| #{output.error && output.error.message} |"

    quality ->
      cells = [
        "`#{output.label}`",
        output.format,
        decimal.(output.bytes / 1.0e6, 2),
        decimal.(quality["bits_per_weight"], 2),
        decimal.(quality["kl_mean"], 4),
        decimal.(quality["kl_p99"], 3),
        decimal.(100 * (quality["same_top"] || 0), 1) <> " %",
        decimal.(quality["perplexity"] / 1000, 2) <> " k",
        String.replace(quality["verdict"] || "", "_", " ")
      ]

      "| " <> Enum.join(cells, " | ") <> " |"
  end
end

head = [
  "| output | format | MB on disk | bits per weight | KL | KL 99 % | same top | perplexity | verdict |",
  "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
]

text = File.read!(guide)
[before, rest] = String.split(text, mark, parts: 2)
[old, behind] = String.split(rest, mark_end, parts: 2)

# Rows of formats of which none was made stay.
cell = fn row, number -> row |> String.split("|") |> Enum.at(number) |> String.trim() end
made = Enum.map(ended, row)
known = old |> String.split("\n", trim: true) |> Enum.drop(length(head))
kept = for row <- known, not Enum.any?(ended, &(&1.format == cell.(row, 2))), do: row

table =
  head ++
    Enum.sort_by(kept ++ made, &Enum.find_index(formats, fn name -> name == cell.(&1, 2) end))

File.write!(guide, [before, mark, "\n\n", Enum.intersperse(table, "\n"), "\n\n", mark_end, behind])

if System.argv() == [], do: File.rm_rf!(Data.dir())
IO.puts("#{length(ended)} outputs, #{job.state}")
