"""What is taken of all that FFmpeg could open, and what is kept out and why."""

# Row of the table: container, codec and sample rate of each sound in it that FFmpeg's own encoders can make.
FILES = {
    "WAV, W64": [
        *(
            ("wav", codec, 16_000)
            for codec in ("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le")
        ),
        *(("wav", codec, 8_000) for codec in ("pcm_alaw", "pcm_mulaw")),
        *(("wav", codec, 16_000) for codec in ("adpcm_ms", "adpcm_ima_wav", "g722")),
        ("wav", "mp3", 44_100),
        ("w64", "pcm_s16le", 16_000),
    ],
    "FLAC": [("flac", "flac", 44_100)],
    "MP3, MP2": [("mp3", "mp3", 44_100), ("mp2", "mp2", 44_100)],
    "AAC": [("adts", "aac", 44_100), ("latm", "aac", 44_100)],
    "MP4, M4A, MOV, 3GP": [
        *(("mp4", codec, 48_000) for codec in ("aac", "mp3", "ac3", "eac3", "libopus")),
        ("ipod", "alac", 44_100),
        ("mov", "aac", 48_000),
        ("mov", "pcm_s16be", 44_100),
        ("3gp", "libopencore_amrnb", 8_000),
    ],
    "Ogg": [("ogg", "libopus", 48_000), ("ogg", "vorbis", 44_100)],
    "WebM, Matroska": [
        *(("webm", "libopus", 48_000), ("webm", "vorbis", 44_100)),
        *(
            ("matroska", codec, 48_000)
            for codec in ("aac", "mp3", "ac3", "eac3", "alac", "wavpack", "tta", "pcm_s16le")
        ),
    ],
    "WMA, WMV": [("asf", "wmav2", 44_100), ("asf", "wmav1", 44_100), ("asf", "mp3", 44_100)],
    "AVI": [("avi", codec, 48_000) for codec in ("mp3", "pcm_s16le", "ac3", "aac", "wmav2")],
    "MPEG-TS, MPG, VOB": [
        *(("mpegts", codec, 48_000) for codec in ("aac", "mp2", "mp3", "ac3", "eac3", "libopus")),
        *(("mpeg", "mp2", 44_100), ("vob", "ac3", 48_000)),
    ],
    "FLV": [("flv", codec, 44_100) for codec in ("aac", "mp3", "pcm_s16le", "adpcm_swf")],
    "AC-3, E-AC-3, DTS, TrueHD": [("ac3", "ac3", 48_000), ("eac3", "eac3", 48_000), ("spdif", "ac3", 48_000)],
    "AIFF, AU, CAF": [
        *(("aiff", "pcm_s16be", 16_000), ("aiff", "pcm_s24be", 44_100), ("au", "pcm_s16be", 16_000)),
        *(("au", "pcm_mulaw", 8_000), ("caf", "pcm_s16le", 16_000), ("caf", "alac", 44_100)),
    ],
    "WavPack, TTA, Monkey's Audio, Musepack, TAK, Shorten": [("wv", "wavpack", 44_100), ("tta", "tta", 44_100)],
    "AMR": [("amr", "libopencore_amrnb", 8_000)],
    "VOC, SoX, IRCAM": [("voc", "pcm_s16le", 16_000), ("sox", "pcm_s32le", 16_000), ("ircam", "pcm_s16le", 16_000)],
    "MXF, GXF, NUT, RealMedia, WTV, DV": [
        *(("mxf_opatom", "pcm_s16le", 48_000), ("gxf", "pcm_s16le", 48_000), ("nut", "aac", 44_100)),
        *(("rm", "ac3", 44_100), ("wtv", "mp2", 44_100)),
    ],
}
# What is taken and no encoder of FFmpeg's makes: demuxer and decoder.
UNMADE = {
    **{"ape": "ape", "dsf": "dsd_lsbf", "dss": "dss_sp", "dts": "dca", "dtshd": "dca", "dv": "pcm_s16le", "gsm": "gsm"},
    **{"iff": "pcm_s8", "mlp": "mlp", "mpc": "mpc7", "mpc8": "mpc8", "nistsphere": "pcm_s16le", "oma": "atrac3"},
    **{"qcp": "qcelp", "shn": "shorten", "tak": "tak", "truehd": "truehd", "xwma": "wmapro"},
}
KEPT_OUT = {
    "it names other files or hosts": "concat hls imf rtsp sdp webm_dash_manifest dash image2 sap rtp vobsub",
    "it is a device or makes its own input": "alsa fbdev kmsgrab lavfi oss video4linux2 v4l2 x11grab",
    "it is text or subtitles": """
        aqtitle ass dvbsub dvbtxt ffmetadata jacosub lrc mcc microdvd mpl2 mpsub pjs rcwt realtext sami sbg scc srt stl
        subviewer subviewer1 sup tedcaptions tty vplayer webvtt bin xbin adf idf""",
    "it is pictures, or films without sound (and all whose name ends in _pipe)": """
        alias_pix anm apng apv av1 avs2 avs3 bfi bitpacked brender_pix cavsvideo cdg cdxl cine dfa dirac dnxhd evc
        filmstrip fits flic gif h261 h263 h264 hevc hnm ico image2pipe ingenient ipu iv8 ivf jpegxl_anim lmlm4 m4v mjpeg
        mjpeg_2000 mlv mpegvideo mpjpeg msp mtv mvi mxg nc obu pdv r3d rawvideo ser v210 v210x
        vc1 vc1test vvc yuv4mpegpipe""",
    "it has no header to be known by": """
        alaw amrnb amrwb aptx aptx_hd bit codec2raw data daud dfpwm f32be f32le f64be f64le g722 g723_1 g726 g726le g728
        mulaw s16be s16le s24be s24le s32be s32le s8 sbc sdr2 sln u16be u16le u24be u24le u32be u32le u8 vidc
        mpegtsraw""",
    "it belongs to a game": """
        3dostr 4xm aa aax acm ace act adp ads adx aea afc aix alp apc apm argo_asf argo_brp argo_cvg ast avs bethsoftvid
        bfstm bink binka bmv boa brstm c93 dcstr derf dsicin dxa ea ea_cdata film_cpk frm fsb fwse gdv genh hca
        hxvs idcin ifv ipmovie iss jv kvag laf luodat lvf mca mgsts mm mods moflex msf mtaf musx mv pmp pp_bnk psxstr
        redspark rl2 roq rpl rsd rso scd sdns sdx sga siff simbiosis_imx smk smush sol svag svs thp tiertexseq tmv txd
        usm vag vividas vivo vmd vpk wady wc3movie wsaud wsvqa xa xmd xmv xvag yop""",
    "hardly anybody has it": """
        ac4 apac asf_o avr bonk codec2 dhav epaf g729 hcom iamf ilbc ivr kux lc3 live_flv lxf mmf msnwctcp
        nsp nsv nuv osq paf pva pvf qoa rka s337m sds smjpeg swf ty vqf wavarc wsd wve""",
}
